"""Operators of a layer that trains in NVFP4: the product, and the two products of its backward pass.

A recipe is passed as the string of `TrainingRecipe.encode`, since an operator takes no other objects.

Shapes: M tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longvideo.kernels.backends import NVFP4Operations, nvfp4_operations
from longvideo.kernels.nvfp4 import dge
from longvideo.kernels.nvfp4.format import GROUP, ExactOperand, NVFP4Tensor
from longvideo.kernels.nvfp4.outliers import split_outliers
from longvideo.quantization.training.backward_products import BackwardProduct
from longvideo.quantization.training.recipe import BackwardOperands, TrainingRecipe, WeightEstimator
from longvideo.quantization.training.rounded_weight import rounded_weight


# custom operators, which torch.compile does not look into: fusion would gain nothing inside
@torch.library.custom_op("longvideo::nvfp4_product", mutates_args=())
def product(
    x_MI: Tensor,
    weight_OI: Tensor,
    average_OI: Tensor,
    seeds: Tensor,
    encoded_recipe: str,
    rounds: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the product [M, O], and what the weight gradient needs of the input.

    That is the codes, scales and tensor scale of an operand, and its outliers [M, I], empty if the recipe clamps none.
    The weight gradient sums over tokens, so its operand has other groups. It is rounded here and kept in 4 bits; if
    backward operands come from the dequantized ones, that of the forward product is kept instead.
    average_OI: average toward which the weight is rounded; empty for none. rounds: whether the operands of the product
    itself are rounded. keep: whether the weight gradient is needed; otherwise all that it needs is empty.
    """
    recipe = TrainingRecipe.decode(encoded_recipe)
    operations, dtype = nvfp4_operations(x_MI.device), x_MI.dtype
    original_MI = x_MI = x_MI.contiguous()
    outliers_MI = x_MI.new_empty(0)
    if recipe.outlier_quantile < 1:
        x_MI, outliers_MI = split_outliers(x_MI, recipe.outlier_quantile)
    if rounds:
        weight = rounded_weight(operations, weight_OI, average_OI, recipe, dtype)
        output = _multiply(operations, operations.quantize_exact(x_MI, recipe.inputs, dtype=dtype), weight)
        if outliers_MI.numel():
            output += operations.add_scaled_bias(F.linear(outliers_MI, weight.values), weight.tensor_scale)
    else:
        output = F.linear(original_MI, weight_OI.to(dtype))
    if not keep:
        return output, *_empty_operand(x_MI), x_MI.new_empty(0)
    if recipe.backward_operands is BackwardOperands.DEQUANTIZED:
        kept = operations.quantize(x_MI, recipe.inputs)
    else:
        kept = BackwardProduct.wgrad(recipe, seeds).round_other(x_MI, recipe.inputs)
    # as bytes, since few operators take E4M3
    return output, kept.codes, kept.scales.view(torch.uint8), kept.tensor_scale, outliers_MI


@torch.library.custom_op("longvideo::nvfp4_product_backward", mutates_args=())
def _product_backward(
    grad_MO: Tensor,
    weight_OI: Tensor,
    average_OI: Tensor,
    codes: Tensor,
    scales: Tensor,
    tensor_scale: Tensor,
    outliers_MI: Tensor,
    seeds: Tensor,
    encoded_recipe: str,
    rounds: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the input [M, I] and of the weight [O, I], which is empty if no operand was kept.

    rounds: whether the forward product rounded the weight, so that the estimator of its rounding applies.
    """
    recipe = TrainingRecipe.decode(encoded_recipe)
    operations, dtype = nvfp4_operations(grad_MO.device), grad_MO.dtype
    grad_MO = grad_MO.contiguous()
    dgrad, wgrad = BackwardProduct.dgrad(recipe, seeds), BackwardProduct.wgrad(recipe, seeds)
    weight = _weight_of_dgrad(dgrad, weight_OI, average_OI, dtype)
    grad_x = _multiply(operations, dgrad.round_gradient(grad_MO, across=False), weight)
    if not codes.numel():
        return grad_x, weight_OI.new_empty(0)
    kept = operations.exact(NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), tensor_scale), dtype)
    if recipe.backward_operands is BackwardOperands.DEQUANTIZED:
        again = operations.exact(wgrad.round_other(kept.values, recipe.inputs), dtype)
        kept = ExactOperand(again.values, again.tensor_scale * kept.tensor_scale)
    grad_weight = _multiply(operations, wgrad.round_gradient(grad_MO, across=True), kept)
    if outliers_MI.numel():
        grad_weight += grad_MO.t() @ outliers_MI
    grad_weight = grad_weight.to(weight_OI.dtype)
    if rounds and recipe.estimator is WeightEstimator.DGE:
        grad_weight *= dge.weight_derivative(weight_OI, recipe.weights, tile_rows=GROUP if recipe.tiles else 1)
    return grad_x, grad_weight


@product.register_fake
def _(
    x_MI: Tensor,
    weight_OI: Tensor,
    _average_OI: Tensor,
    seeds: Tensor,
    encoded_recipe: str,
    _rounds: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    recipe = TrainingRecipe.decode(encoded_recipe)
    tokens, width = x_MI.shape
    output = x_MI.new_empty(tokens, weight_OI.shape[0])
    if not keep:
        return output, *_empty_operand(x_MI), x_MI.new_empty(0)
    outliers = torch.empty_like(x_MI) if recipe.outlier_quantile < 1 else x_MI.new_empty(0)
    rows, values = tokens, width
    if recipe.backward_operands is BackwardOperands.ORIGINALS:
        rows, values = width, BackwardProduct.wgrad(recipe, seeds).padded(tokens)
    return output, *_empty_operand(x_MI, (rows, values // 2), (rows, values // GROUP), ()), outliers


@_product_backward.register_fake
def _(
    grad_MO: Tensor,
    weight_OI: Tensor,
    _average_OI: Tensor,
    codes: Tensor,
    _scales: Tensor,
    _tensor_scale: Tensor,
    _outliers_MI: Tensor,
    _seeds: Tensor,
    _encoded_recipe: str,
    _rounds: bool,
) -> tuple[Tensor, Tensor]:
    grad_weight = torch.empty_like(weight_OI) if codes.numel() else weight_OI.new_empty(0)
    return grad_MO.new_empty(grad_MO.shape[0], weight_OI.shape[1]), grad_weight


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight, average, seeds, ctx.encoded_recipe, ctx.rounds, _ = inputs
    ctx.save_for_backward(weight, average, *output[1:], seeds)


def _differentiate(ctx: Any, grad_MO: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grads = _product_backward(grad_MO, *ctx.saved_tensors, ctx.encoded_recipe, ctx.rounds)
    grad_x, grad_weight = (grad if grad.numel() else None for grad in grads)
    return grad_x, grad_weight, None, None, None, None, None


product.register_autograd(_differentiate, setup_context=_save_for_backward)


def _empty_operand(
    x: Tensor, codes: tuple[int, ...] = (0,), scales: tuple[int, ...] = (0,), tensor_scale: tuple[int, ...] = (0,)
) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty tensors with the dtypes of a packed operand."""
    return (
        x.new_empty(codes, dtype=torch.uint8),
        x.new_empty(scales, dtype=torch.uint8),
        x.new_empty(tensor_scale, dtype=torch.float32),
    )


def _weight_of_dgrad(dgrad: BackwardProduct, weight_OI: Tensor, average_OI: Tensor, dtype: torch.dtype) -> ExactOperand:
    """Return the transpose of the weight as an operand of a product along outputs, [I, O]."""
    operations, recipe = dgrad.operations, dgrad.recipe
    if recipe.tiles and not dgrad.points:
        exact = rounded_weight(operations, weight_OI, average_OI, recipe, dtype)
        # a transposed tile of 16 x 16 has the same values
        return ExactOperand(exact.values.t(), exact.tensor_scale)
    if recipe.backward_operands is BackwardOperands.ORIGINALS:
        return operations.exact(dgrad.round_other(weight_OI, recipe.weights), dtype)
    forward = rounded_weight(operations, weight_OI, average_OI, recipe, dtype)
    again = operations.exact(dgrad.round_other(forward.values, recipe.weights), dtype)
    return ExactOperand(again.values, again.tensor_scale * forward.tensor_scale)


def _multiply(operations: NVFP4Operations, left: ExactOperand, right: ExactOperand) -> Tensor:
    """Return the product of [.., K] and the transpose of [.., K], with both tensor scales."""
    product = F.linear(left.values, right.values)
    return operations.add_scaled_bias(product, left.tensor_scale * right.tensor_scale)
