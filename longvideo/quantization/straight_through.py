"""Linear layers that compute generation's 4-bit products of a weight that is trained.

Every product rounds the input, and reads a weight that `pack` rounded as `longvideo quantize` packs a stored model: to
bfloat16, then in groups of 16. The backward pass takes both roundings for the identity (straight-through, arXiv
1308.3432), and multiplies the gradient by the rounded weight and the rounded input, in the dtype of the input.

Shapes: M tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from longvideo.kernels.backends import nvfp4_operations
from longvideo.quantization.selection import BLOCKS, layers_to_quantize

if TYPE_CHECKING:
    from longvideo.kernels.nvfp4.format import ExactOperand, NVFP4Tensor
    from longvideo.model.transformer import CausalTransformer
    from longvideo.quantization.products import W4A4, Weight

STORED = torch.bfloat16
"""Number format in which models store their weights, and from which they are packed."""


class StraightThroughLinear(nn.Module):
    """A linear layer with the output of a packed layer, and with gradients for its weight and bias in full precision.

    It shares the parameters of another layer. `pack` must be called after every change of the weight.
    """

    def __init__(self, linear: nn.Linear, product: W4A4) -> None:
        super().__init__()
        self.weight, self.bias, self.product = linear.weight, linear.bias, product
        self._packed: tuple[NVFP4Tensor, Weight] | None = None

    @torch.no_grad()
    def pack(self) -> None:
        """Round the weight for the products that follow."""
        operations = nvfp4_operations(self.weight.device)
        packed = operations.quantize(self.weight.to(STORED), self.product.rule)
        self._packed = packed, self.product.prepare_weight(packed)

    def forward(self, x: Tensor) -> Tensor:
        output = _StraightThroughProduct.apply(x, self.weight, self.bias, self)
        assert isinstance(output, Tensor)
        return output

    def multiply(self, x: Tensor) -> Tensor:
        """Return the output without a gradient. Raises RuntimeError before `pack`."""
        bias = None if self.bias is None else self.bias.to(STORED)
        return self.product(x, self._rounded()[1], bias)

    def exact_weight(self, dtype: torch.dtype) -> ExactOperand:
        """Return the rounded weight [O, I]."""
        return nvfp4_operations(self.weight.device).exact(self._rounded()[0], dtype)

    def _rounded(self) -> tuple[NVFP4Tensor, Weight]:
        if self._packed is None:
            raise RuntimeError("this StraightThroughLinear has no rounded weight; call its pack")
        return self._packed


class _StraightThroughProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, _weight: Tensor, _bias: Tensor | None, layer: StraightThroughLinear) -> Tensor:
        ctx.layer = layer
        # the input is rounded again in the backward pass: layers that share it keep one tensor
        ctx.save_for_backward(x)
        return layer.multiply(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (grad,) = ctx.saved_tensors, grads
        layer: StraightThroughLinear = ctx.layer
        operations = nvfp4_operations(grad.device)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = layer.exact_weight(grad.dtype)
            grad_x = operations.add_scaled_bias(grad @ weight.values, weight.tensor_scale)
        grad_MO = grad.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            rounded = operations.quantize_exact(x.contiguous(), layer.product.rule, dtype=x.dtype)
            product = grad_MO.t() @ rounded.values.flatten(0, -2)
            grad_weight = operations.add_scaled_bias(product, rounded.tensor_scale).to(layer.weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_MO.sum(0, dtype=torch.float32).to(layer.bias.dtype)
        return grad_x, grad_weight, grad_bias, None


class Stored(nn.Module):
    """The value of a parameter as a model stores it, with the gradient of the parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return x.to(STORED).to(x.dtype)


def train_packed(model: CausalTransformer, product: W4A4) -> dict[str, nn.Parameter]:
    """Make the blocks compute what the packed model computes, with gradients for all their parameters.

    Return these parameters by name; they become float32, and everything outside the blocks is frozen.
    `pack_layers` must be called after every change of them.
    """
    model.requires_grad_(False)
    names = layers_to_quantize(model)
    for block in model.blocks:
        block.float().requires_grad_(True)
    parameters = {name: weight for name, weight in model.named_parameters() if name.startswith(BLOCKS)}
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(name, StraightThroughLinear(linear, product))
    of_layers = tuple(f"{name}." for name in names)
    for name in parameters:
        if not name.startswith(of_layers):
            place, _, leaf = name.rpartition(".")
            parametrize.register_parametrization(model.get_submodule(place), leaf, Stored())
    pack_layers(model)
    return parameters


def pack_layers(model: CausalTransformer) -> None:
    """Round the weights of all layers that are trained, as they are now."""
    for layer in model.modules():
        if isinstance(layer, StraightThroughLinear):
            layer.pack()
