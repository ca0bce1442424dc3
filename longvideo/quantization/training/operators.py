"""Operators of a layer that trains in NVFP4: the product, and the two products of its backward pass.

Shapes: M tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longvideo.kernels.backends import NVFP4Operations, nvfp4_operations
from longvideo.kernels.nvfp4.format import GROUP, ExactOperand, NVFP4Tensor, Rule


# custom operators, which torch.compile does not look into: fusion would gain nothing inside
@torch.library.custom_op("longvideo::nvfp4_product", mutates_args=())
def product(
    x_MI: Tensor,
    weight_OI: Tensor,
    _seeds: Tensor,
    inputs: str,
    weights: str,
    tiles: bool,
    _stochastic: bool,
    hadamard: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the product [M, O], and the codes, scales and tensor scale of the input for the weight gradient.

    The weight gradient sums over tokens, so its operand has other groups, which are rounded here and kept in 4 bits.
    keep: whether the operand is needed; otherwise it is empty.
    """
    operations, dtype = nvfp4_operations(x_MI.device), x_MI.dtype
    x_MI = x_MI.contiguous()
    weight = _weight(operations, weight_OI, Rule(weights), tiles, dtype)
    output = _multiply(operations, operations.quantize_exact(x_MI, Rule(inputs), dtype=dtype), weight)
    if not keep:
        return output, *_empty_operand(x_MI)
    kept = operations.quantize_across(x_MI, Rule(inputs), hadamard=hadamard)
    # as bytes, since few operators take E4M3
    return output, kept.codes, kept.scales.view(torch.uint8), kept.tensor_scale


@torch.library.custom_op("longvideo::nvfp4_product_backward", mutates_args=())
def _product_backward(
    grad_MO: Tensor,
    weight_OI: Tensor,
    codes: Tensor,
    scales: Tensor,
    tensor_scale: Tensor,
    seeds: Tensor,
    weights: str,
    tiles: bool,
    stochastic: bool,
    hadamard: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the input [M, I] and of the weight [O, I], which is empty if no operand was kept."""
    operations, dtype = nvfp4_operations(grad_MO.device), grad_MO.dtype
    grad_MO = grad_MO.contiguous()
    seed_x, seed_weight = seeds.unbind() if stochastic else (None, None)
    if tiles:
        exact = _weight(operations, weight_OI, Rule(weights), tiles, dtype)
        # a transposed tile of 16 x 16 has the same values, so this is a product along outputs
        transposed = ExactOperand(exact.values.t(), exact.tensor_scale)
    else:
        transposed = operations.quantize_across_exact(weight_OI, Rule(weights), dtype=dtype)
    rounded = operations.quantize_exact(grad_MO, Rule.STATIC6, seed=seed_x, dtype=dtype)
    grad_x = _multiply(operations, rounded, transposed)
    if not codes.numel():
        return grad_x, weight_OI.new_empty(0)
    across = operations.quantize_across_exact(grad_MO, Rule.STATIC6, hadamard=hadamard, seed=seed_weight, dtype=dtype)
    kept = operations.exact(NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), tensor_scale), dtype)
    return grad_x, _multiply(operations, across, kept).to(weight_OI.dtype)


@product.register_fake
def _(
    x_MI: Tensor,
    weight_OI: Tensor,
    _seeds: Tensor,
    _inputs: str,
    _weights: str,
    _tiles: bool,
    _stochastic: bool,
    _hadamard: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, width = x_MI.shape
    groups = -(-tokens // GROUP)
    output = x_MI.new_empty(tokens, weight_OI.shape[0])
    if not keep:
        return output, *_empty_operand(x_MI)
    return output, *_empty_operand(x_MI, (width, groups * GROUP // 2), (width, groups), ())


@_product_backward.register_fake
def _(
    grad_MO: Tensor,
    weight_OI: Tensor,
    codes: Tensor,
    _scales: Tensor,
    _tensor_scale: Tensor,
    _seeds: Tensor,
    _weights: str,
    _tiles: bool,
    _stochastic: bool,
    _hadamard: bool,
) -> tuple[Tensor, Tensor]:
    grad_weight = torch.empty_like(weight_OI) if codes.numel() else weight_OI.new_empty(0)
    return grad_MO.new_empty(grad_MO.shape[0], weight_OI.shape[1]), grad_weight


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight, seeds, _, *ctx.settings, _ = inputs
    ctx.save_for_backward(weight, *output[1:], seeds)


def _differentiate(ctx: Any, grad_MO: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    weight, codes, scales, tensor_scale, seeds = ctx.saved_tensors
    grads = _product_backward(grad_MO, weight, codes, scales, tensor_scale, seeds, *ctx.settings)
    grad_x, grad_weight = (grad if grad.numel() else None for grad in grads)
    return grad_x, grad_weight, *(None,) * 7


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


def _weight(
    operations: NVFP4Operations, weight_OI: Tensor, rule: Rule, tiles: bool, dtype: torch.dtype
) -> ExactOperand:
    rounded = operations.quantize_tiles_exact if tiles else operations.quantize_exact
    return rounded(weight_OI, rule, dtype=dtype)


def _multiply(operations: NVFP4Operations, left: ExactOperand, right: ExactOperand) -> Tensor:
    """Return the product of [.., K] and the transpose of [.., K], with both tensor scales."""
    product = F.linear(left.values, right.values)
    return operations.add_scaled_bias(product, left.tensor_scale * right.tensor_scale)
