"""A linear layer with a weight in packed NVFP4, and modules that round its input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longvideo.kernels.backends import nvfp4_operations
from longvideo.kernels.nvfp4 import reference
from longvideo.kernels.nvfp4.format import GROUP, NVFP4Tensor, Rule, check_groups
from longvideo.quantization.branch import LowRankBranch
from longvideo.quantization.products import InputPair

if TYPE_CHECKING:
    from longvideo.quantization.products import W4A4, Input, Product, Weight

CODES, SCALES, TENSOR_SCALE = "weight_codes", "weight_scales", "weight_tensor_scale"


class NVFP4Linear(nn.Module):
    """A linear layer with a frozen packed weight [out, in], in groups of 16 along `in`, a bias, and perhaps a branch.

    The input may require a gradient, which is computed with the dequantized weight; the rounding of inputs counts as
    the identity. `set_product` must be called before the layer is run, on the device where the weight will stay.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        check_groups(torch.Size((out_features, in_features)))
        self.in_features, self.out_features = in_features, out_features
        self.product: Product | None = None
        self.branch: LowRankBranch | None = None
        self._operand: Weight | None = None
        codes = torch.empty(out_features, in_features // 2, dtype=torch.uint8, device=device)
        scales = torch.empty(out_features, in_features // GROUP, dtype=torch.float8_e4m3fn, device=device)
        self.register_buffer(CODES, codes)
        self.register_buffer(SCALES, scales)
        self.register_buffer(TENSOR_SCALE, torch.empty((), dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, device=device), requires_grad=False) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, rule: Rule = Rule.ADAPTIVE, *, name: str = "weight") -> NVFP4Linear:
        """Return a layer with the packed weight of another. name: name of the weight in errors.

        Raises ValueError for NaN, infinity, and a number of inputs that is not a multiple of 16.
        """
        packed = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        quantized = reference.quantize(linear.weight.detach(), rule, name=name)
        setattr(packed, CODES, quantized.codes)
        setattr(packed, SCALES, quantized.scales)
        setattr(packed, TENSOR_SCALE, quantized.tensor_scale)
        if linear.bias is not None:
            packed.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return packed

    def set_product(self, product: Product) -> None:
        """Set the product of the layer, and arrange its weight for it."""
        self.product, self._operand = product, product.prepare_weight(self.quantized_weight)

    @property
    def quantized_weight(self) -> NVFP4Tensor:
        return NVFP4Tensor(self.get_buffer(CODES), self.get_buffer(SCALES), self.get_buffer(TENSOR_SCALE))

    def add_branch(self, down: Tensor, up: Tensor) -> None:
        """Add the product of the unrounded input and `up @ down` to every output; see `LowRankBranch`."""
        assert self.branch is None, "a layer has one branch, with the ranks of all updates"
        self.branch = LowRankBranch(down, up)

    def forward(self, x: Input | InputPair) -> Tensor:
        rounded, exact = (x.rounded, x.exact) if isinstance(x, InputPair) else (x, x)
        if isinstance(rounded, Tensor) and rounded.requires_grad and torch.is_grad_enabled():
            output = _FrozenProduct.apply(rounded, self)
            assert isinstance(output, Tensor)
        else:
            output = self.multiply(rounded)
        if self.branch is None:
            return output
        assert isinstance(exact, Tensor), "a layer with a branch needs the unrounded input"
        return self.branch(output, exact)

    def multiply(self, x: Input) -> Tensor:
        """Return the output without the branch and without a gradient. Raises RuntimeError before `set_product`."""
        if self.product is None or self._operand is None:
            raise RuntimeError("this NVFP4Linear has no product; call its set_product")
        return self.product(x, self._operand, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {type(self.product).__name__}"


class RoundedInput(nn.Module):
    """Rounding of an input, once for all layers that read it."""

    def __init__(self, product: W4A4) -> None:
        super().__init__()
        self.product = product

    def forward(self, x: Tensor) -> Input:
        return self.product.prepare(x)


class RoundedModulatedNorm(nn.Module):
    """`ModulatedNorm` with a rounded result."""

    def __init__(self, eps: float, product: W4A4) -> None:
        super().__init__()
        self.eps, self.product = eps, product

    def forward(self, h_BLD: Tensor, shift_BTSD: Tensor, scale_BTSD: Tensor) -> Input:
        return self.product.prepare_modulated(h_BLD, shift_BTSD, scale_BTSD, eps=self.eps)


class RoundedGELU(nn.Module):
    """GELU with a rounded result."""

    def __init__(self, product: W4A4) -> None:
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
        # the weight is dequantized again: packing avoids a bf16 copy of every layer
        weight = nvfp4_operations(grad.device).dequantize(ctx.layer.quantized_weight, grad.dtype)
        return grad @ weight, None
