"""A linear layer whose weight is packed NVFP4."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longvideo.kernels.backends import nvfp4_operations
from longvideo.kernels.nvfp4 import reference
from longvideo.kernels.nvfp4.format import GROUP, NVFP4Tensor, Rule, check_groups

if TYPE_CHECKING:
    from longvideo.quantization.products import W4A4, Input, Product, Weight

CODES, SCALES, TENSOR_SCALE = "weight_codes", "weight_scales", "weight_tensor_scale"


class NVFP4Linear(nn.Module):
    """A frozen packed weight [out, in] in groups of 16 along `in`, and a bias; the input may need a gradient.

    The gradient of the input is that of the dequantised weight; the rounding of inputs counts as the identity.
    A layer cannot be run before `set_product`, which is called where its weight will stay.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, device: torch.device | str | None = None):
        super().__init__()
        check_groups(torch.Size((out_features, in_features)))
        self.in_features, self.out_features = in_features, out_features
        self.product: Product | None = None
        self._operand: Weight | None = None
        codes = torch.empty(out_features, in_features // 2, dtype=torch.uint8, device=device)
        scales = torch.empty(out_features, in_features // GROUP, dtype=torch.float8_e4m3fn, device=device)
        self.register_buffer(CODES, codes)
        self.register_buffer(SCALES, scales)
        self.register_buffer(TENSOR_SCALE, torch.empty((), dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, device=device), requires_grad=False) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, rule: Rule = Rule.ADAPTIVE, *, name: str = "weight") -> NVFP4Linear:
        """Quantise a layer's weight. Raises ValueError, naming it, for NaN, infinity, or a size 16 does not divide."""
        packed = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        quantized = reference.quantize(linear.weight.detach(), rule, name=name)
        setattr(packed, CODES, quantized.codes)
        setattr(packed, SCALES, quantized.scales)
        setattr(packed, TENSOR_SCALE, quantized.tensor_scale)
        if linear.bias is not None:
            packed.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return packed

    def set_product(self, product: Product) -> None:
        """Say how the layer multiplies, and lay its weight out for that."""
        self.product, self._operand = product, product.prepare_weight(self.quantized_weight)

    @property
    def quantized_weight(self) -> NVFP4Tensor:
        return NVFP4Tensor(self.get_buffer(CODES), self.get_buffer(SCALES), self.get_buffer(TENSOR_SCALE))

    def forward(self, x: Input) -> Tensor:
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            output = _FrozenProduct.apply(x, self)
            assert isinstance(output, Tensor)
            return output
        return self.multiply(x)

    def multiply(self, x: Input) -> Tensor:
        """Compute the output without a gradient."""
        if self.product is None or self._operand is None:
            raise RuntimeError("this NVFP4Linear does not know how to multiply; call its set_product")
        return self.product(x, self._operand, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {type(self.product).__name__}"


class RoundedInput(nn.Module):
    """Round an input once for all layers that read it."""

    def __init__(self, product: W4A4):
        super().__init__()
        self.product = product

    def forward(self, x: Tensor) -> Input:
        return self.product.prepare(x)


class RoundedModulatedNorm(nn.Module):
    """`ModulatedNorm` whose result is rounded."""

    def __init__(self, eps: float, product: W4A4):
        super().__init__()
        self.eps, self.product = eps, product

    def forward(self, h_BLD: Tensor, shift_BTSD: Tensor, scale_BTSD: Tensor) -> Input:
        return self.product.prepare_modulated(h_BLD, shift_BTSD, scale_BTSD, eps=self.eps)


class RoundedGELU(nn.Module):
    """GELU whose result is rounded."""

    def __init__(self, product: W4A4):
        super().__init__()
        self.product = product

    def forward(self, h: Tensor) -> Input:
        return self.product.prepare_gelu(h)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: NVFP4Linear) -> Tensor:
        ctx.layer = layer
        return layer.multiply(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        # the weight is rebuilt rather than kept: a bf16 copy of every layer is what packing is to avoid
        weight = nvfp4_operations(grad.device).dequantize(ctx.layer.quantized_weight, grad.dtype)
        return grad @ weight, None
