"""Linear layers that train in NVFP4: all three products of a step are of 4-bit operands, emulated in torch.

Recipe of "Pretraining Large Language Models with NVFP4" (arXiv 2509.25149, section 4): weights in 16 x 16 tiles, so
that forward and backward see the same rounding; gradients rounded stochastically; a random Hadamard transform on both
operands of the weight gradient. The master weight stays as it is, and each operand is rounded from it once.

Shapes: M tokens, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longvideo.kernels.nvfp4 import reference
from longvideo.kernels.nvfp4.format import GROUP, ExactOperand, NVFP4Tensor, Rule, check_groups


@dataclass(frozen=True)
class TrainingRecipe:
    """How operands are rounded.

    inputs, weights: rules of rounding to nearest. Gradients are always `static6`, the rule that stochastic rounding
    keeps unbiased. tiles: 16 x 16 for weights, so that both directions see one rounding; without them each direction
    rounds along the dimension it sums over. stochastic_gradients, hadamard: of the backward products; without them
    they lose their reason.
    """

    inputs: Rule = Rule.ADAPTIVE
    weights: Rule = Rule.STATIC6
    tiles: bool = True
    stochastic_gradients: bool = True
    hadamard: bool = True


class NVFP4TrainingLinear(nn.Linear):
    """`nn.Linear` whose forward product and both backward products have NVFP4 operands.

    generator: on the layer's device, draws the stochastic rounding; layers may share one. Raises ValueError when 16
    does not divide inputs and outputs, along which the products of a step sum.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        recipe: TrainingRecipe,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        check_groups(torch.Size((out_features, in_features)), tile_rows=GROUP)
        self.recipe, self.generator = recipe, generator

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, recipe: TrainingRecipe, generator: torch.Generator
    ) -> NVFP4TrainingLinear:
        """Take over a layer's parameters, the same objects."""
        bias = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, bias, recipe=recipe, generator=generator, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer

    def forward(self, input: Tensor) -> Tensor:
        output = _TrainingProduct.apply(input.flatten(0, -2), self.weight, self)
        assert isinstance(output, Tensor)
        output = output.unflatten(0, input.shape[:-1])
        return output if self.bias is None else output + self.bias.to(output.dtype)


class _TrainingProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, weight_OI: Tensor, layer: NVFP4TrainingLinear) -> Tensor:
        recipe, dtype = layer.recipe, x_MI.dtype
        weight = reference.quantize(weight_OI, recipe.weights, tile_rows=GROUP if recipe.tiles else 1)
        ctx.layer, ctx.num_tokens = layer, x_MI.shape[0]
        ctx.weight_dtype = weight_OI.dtype
        # the weight gradient sums over tokens, so its operand has other groups: rounded now, kept in 4 bits
        across = _across_tokens(x_MI, recipe.hadamard) if ctx.needs_input_grad[1] else None
        kept = None if across is None else reference.quantize(across, recipe.inputs)
        backward_weight = weight if recipe.tiles else reference.quantize(weight_OI.t().contiguous(), recipe.weights)
        ctx.operands = (backward_weight, kept)
        return _multiply(reference.quantize_exact(x_MI, recipe.inputs, dtype=dtype), reference.exact(weight, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad_MO,) = grads
        layer, dtype = ctx.layer, grad_MO.dtype
        generator = layer.generator if layer.recipe.stochastic_gradients else None
        weight, kept = ctx.operands
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            rounded = reference.quantize_exact(grad_MO, Rule.STATIC6, generator=generator, dtype=dtype)
            exact = reference.exact(weight, dtype)
            if layer.recipe.tiles:
                # tiles of 16 x 16 have the same codes the other way round, so this is a product along outputs
                exact = ExactOperand(exact.values.t(), exact.tensor_scale)
            grad_x = _multiply(rounded, exact)
        if ctx.needs_input_grad[1]:
            assert isinstance(kept, NVFP4Tensor)
            across = _across_tokens(grad_MO, layer.recipe.hadamard)
            rounded = reference.quantize_exact(across, Rule.STATIC6, generator=generator, dtype=dtype)
            grad_weight = _multiply(rounded, reference.exact(kept, dtype)).to(ctx.weight_dtype)
        return grad_x, grad_weight, None


def _multiply(left: ExactOperand, right: ExactOperand) -> Tensor:
    """Multiply [.., K] by the transpose of [.., K] and apply both tensor scales."""
    product = F.linear(left.values, right.values)
    return (product.float() * (left.tensor_scale * right.tensor_scale)).to(product.dtype)


def _across_tokens(x_MC: Tensor, hadamard: bool) -> Tensor:
    """Transpose to [C, M], M padded with zeros to a multiple of 16, and transform along M."""
    padded = F.pad(x_MC, (0, 0, 0, -x_MC.shape[0] % GROUP)).t().contiguous()
    return reference.random_hadamard(padded) if hadamard else padded
