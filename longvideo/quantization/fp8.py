"""Linear layers with FP8 weights and inputs and a scale for each row (W8A8), for inference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from longvideo.errors import UserError
from longvideo.kernels.backends import FP8Operations, fp8_operations
from longvideo.kernels.fp8 import reference
from longvideo.kernels.fp8.format import SIZE_MULTIPLE, FP8Rows
from longvideo.quantization.selection import linear_layers

if TYPE_CHECKING:
    from collections.abc import Callable

    from longvideo.model.transformer import CausalTransformer

VALUES, SCALES = "weight_values", "weight_scales"


class FP8Linear(nn.Module):
    """A linear layer with a frozen weight [out, in] in FP8, a scale for each output, and a bias.

    It is built on the device of the weight, and has the operations of that device. The result has the dtype of the
    bias; without a bias it has the dtype of the input, or bfloat16 for an input in FP8.
    """

    def __init__(self, weight: FP8Rows, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias: Tensor | None
        self.operations: FP8Operations = fp8_operations(weight.values.device)
        self.register_buffer(VALUES, weight.values)
        self.register_buffer(SCALES, weight.scales)
        self.register_buffer("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, name: str = "weight") -> FP8Linear:
        """Return a layer with the quantized weight of another. name: name of the weight in errors.

        Raises ValueError for NaN or infinity.
        """
        weight = linear.weight.detach()
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name} {list(weight.shape)} holds NaN or infinity; expected finite values")
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(reference.quantize_rows(weight), bias)

    @property
    def quantized_weight(self) -> FP8Rows:
        return FP8Rows(self.get_buffer(VALUES), self.get_buffer(SCALES))

    def forward(self, x: Tensor | FP8Rows) -> Tensor:
        """Return the product [..., out] of an input [..., in]; a Tensor is quantized first.

        Raises RuntimeError for an input that requires a gradient.
        """
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "an FP8 layer has no gradient, and its input requires one; run it under torch.no_grad(), "
                'or use precision "nvfp4" or "bf16" for training'
            )
        dtype = x.dtype if isinstance(x, Tensor) else torch.bfloat16
        if self.bias is not None:
            dtype = self.bias.dtype
        rows = self.operations.quantize_rows(x) if isinstance(x, Tensor) else x
        return self.operations.matmul(rows, self.quantized_weight, self.bias, dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def layers_in_fp8(model: CausalTransformer) -> list[str]:
    """Return the names of the linear layers of the blocks, which FP8 replaces.

    Raises UserError for a layer with sizes that are not multiples of 16.
    """
    names = linear_layers(model)
    for name in names:
        linear = _linear(model, name)
        if linear.in_features % SIZE_MULTIPLE or linear.out_features % SIZE_MULTIPLE:
            raise UserError(
                f"{name} has {linear.in_features} inputs and {linear.out_features} outputs; expected multiples of "
                f"{SIZE_MULTIPLE} for FP8; use --precision bf16"
            )
    return names


def quantize_layers_fp8(
    model: CausalTransformer,
    *,
    device: torch.device | None = None,
    stored: Callable[[str], FP8Rows | None] = lambda _name: None,
) -> list[str]:
    """Replace the linear layers of the blocks by FP8 ones in place and return their names.

    device: device to which each layer is moved before it is quantized; None leaves it where it is. stored: function of
    the name of a layer that returns its weight where it is in FP8 already, else None.
    Raises the errors of `layers_in_fp8` before any layer is replaced, and ValueError for NaN or infinity in a weight.
    """
    names = layers_in_fp8(model)
    for name in names:
        linear, rows = _linear(model, name).to(device), stored(name)
        if rows is None:
            layer = FP8Linear.from_linear(linear, name=f"{name}.weight")
        else:
            own_device = linear.weight.device
            bias = None if linear.bias is None else linear.bias.detach()
            layer = FP8Linear(FP8Rows(rows.values.to(own_device), rows.scales.to(own_device)), bias)
        model.set_submodule(name, layer)
    return names


def _linear(model: CausalTransformer, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise UserError(
            f"{name} is packed in 4 bits; expected unpacked weights for FP8; use --precision nvfp4 or nvfp4-weights"
        )
    return layer
