"""Linear layers that train in FP8: all three products of a step have 8-bit operands with one scale for each tensor.

Inputs and weights are in E4M3, gradients in E5M2 (arXiv 2209.05433). The scale of a tensor follows from its own largest
magnitude (current scaling), or from the largest one of earlier steps (delayed scaling), which needs no pass over the
tensor before it is rounded. The master weight is not rounded.

Shapes: M tokens, I inputs, O outputs, H steps of a history.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longvideo.kernels.backends import fp8_operations
from longvideo.kernels.fp8.format import SIZE_MULTIPLE, FP8Tensor
from longvideo.kernels.fp8.reference import tensor_scale
from longvideo.quantization.training.phase import TrainingPhase

if TYPE_CHECKING:
    from collections.abc import Callable

HISTORY = 16
"""Number of earlier steps whose largest magnitudes delayed scaling uses."""
INPUT, WEIGHT, GRADIENT = range(3)
"""Rows of the largest magnitudes of a layer."""
FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2


class FP8Scaling(str, Enum):
    """Magnitude that a scale follows from: that of the tensor itself, or the largest one of earlier steps."""

    CURRENT = "current"
    DELAYED = "delayed"


class FP8TrainingLinear(nn.Linear):
    """`nn.Linear` with FP8 operands in the forward product and in both backward products.

    phase: passes whose operands are rounded; in `TrainingPhase.NEITHER` the layer is a plain `nn.Linear`.
    amaxes: with delayed scaling the largest magnitudes of inputs, weights and gradients, float32 [3, 1 + H]: those of
        this step, then those of earlier steps, the newest first, or zero. `next_step` moves them.
    Without a history a tensor has the scale of its own magnitude. Under autocast, inputs are rounded to its dtype
    first, but weights are not. Raises ValueError unless inputs and outputs are multiples of 16.
    """

    amaxes: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scaling: FP8Scaling,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        if in_features % SIZE_MULTIPLE or out_features % SIZE_MULTIPLE:
            raise ValueError(
                f"the layer has {in_features} inputs and {out_features} outputs; expected multiples of"
                f" {SIZE_MULTIPLE} for FP8"
            )
        self.scaling = scaling
        self.phase = TrainingPhase.BOTH
        # a buffer, since a CUDA graph reads it at its address; a run stores those of all layers together
        self.register_buffer("amaxes", torch.zeros(3, 1 + HISTORY, device=device), persistent=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, scaling: FP8Scaling) -> FP8TrainingLinear:
        """Return a layer that shares the parameters of another one."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, scaling=scaling, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.amaxes = torch.zeros(3, 1 + HISTORY, device=linear.weight.device)
        return layer

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FP8TrainingLinear:
        """Change the parameters, as for a model in bf16, but not the dtype of the magnitudes."""
        amaxes = self.amaxes
        super()._apply(fn, recurse)
        if self.amaxes.dtype != amaxes.dtype:
            self.amaxes = amaxes.to(self.amaxes.device)
        return self

    def set_amaxes(self, amaxes: Tensor) -> None:
        """Set the magnitudes of this step and of earlier ones."""
        self.amaxes.copy_(amaxes)

    def forward(self, input: Tensor) -> Tensor:
        if self.phase is TrainingPhase.NEITHER:
            return super().forward(input)
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        flat = input.flatten(0, -2)
        keep = self.weight.requires_grad and torch.is_grad_enabled()
        flat = _product(
            flat,
            self.weight,
            self._amax(flat, INPUT),
            self._amax(self.weight, WEIGHT),
            self.amaxes[GRADIENT],
            self.scaling is FP8Scaling.DELAYED,
            self.phase is TrainingPhase.BOTH,
            keep,
        )[0]
        output = flat.unflatten(0, input.shape[:-1])
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def _amax(self, x: Tensor, row: int) -> Tensor:
        """Return the magnitude that the scale of a tensor follows from, and note its own if gradients are needed."""
        records = self.scaling is FP8Scaling.DELAYED and torch.is_grad_enabled()
        with torch.no_grad():
            own = x.detach().abs().amax().float()
            if self.scaling is FP8Scaling.CURRENT:
                return own
            amax = _delayed(self.amaxes[row], own)
            if records:
                _record(self.amaxes[row], own)
            return amax


def next_step(amaxes: Tensor) -> Tensor:
    """Return magnitudes [..., 1 + H] with those of this step moved into the history, without its oldest."""
    return F.pad(amaxes[..., :-1], (1, 0))


def _delayed(amaxes_H: Tensor, own: Tensor) -> Tensor:
    """Return the largest magnitude of the history, or the tensor's own if there is no history."""
    largest = amaxes_H[1:].amax()
    return torch.where(largest > 0, largest, own)


def _record(amaxes_H: Tensor, own: Tensor) -> None:
    """Note a magnitude of this step in place. One that is not finite would spoil the steps after it."""
    amaxes_H[0].copy_(torch.maximum(amaxes_H[0], own.nan_to_num(0.0, 0.0, 0.0)))


# custom operators, as in `operators`: torch.compile does not look into them
@torch.library.custom_op("longvideo::fp8_training_product", mutates_args=())
def _product(
    x_MI: Tensor,
    weight_OI: Tensor,
    x_amax: Tensor,
    weight_amax: Tensor,
    _gradient_amaxes: Tensor,
    _delayed_scaling: bool,
    rounds: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return the product [M, O], and the values of the transposed input for the weight gradient, bytes [I, M padded].

    rounds: whether the operands of the product itself are rounded. keep: whether the input is needed; otherwise its
    values are empty.
    """
    operations, dtype = fp8_operations(x_MI.device), x_MI.dtype
    x_MI, empty = x_MI.contiguous(), x_MI.new_empty(0, dtype=torch.uint8)
    if not rounds:
        output = F.linear(x_MI, weight_OI.to(dtype))
        across = operations.quantize_transposed(x_MI, x_amax, FORWARD) if keep else None
    else:
        if keep:
            x, across = operations.quantize_both(x_MI, x_amax, FORWARD)
        else:
            x, across = operations.quantize_tensor(x_MI, x_amax, FORWARD), None
        weight = operations.quantize_tensor(weight_OI, weight_amax, FORWARD)
        output = operations.matmul_tensors(x, weight, dtype, fast_sums=True)
    return output, empty if across is None else across.values.view(torch.uint8)


@torch.library.custom_op("longvideo::fp8_training_product_backward", mutates_args=("gradient_amaxes",))
def _product_backward(
    grad_MO: Tensor,
    weight_OI: Tensor,
    x_values: Tensor,
    x_amax: Tensor,
    weight_amax: Tensor,
    gradient_amaxes: Tensor,
    delayed_scaling: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the input [M, I] and of the weight [O, I], which is empty if no input was kept."""
    operations, dtype = fp8_operations(grad_MO.device), grad_MO.dtype
    own = operations.largest_magnitude(grad_MO)
    amax = _delayed(gradient_amaxes, own) if delayed_scaling else own
    if delayed_scaling:
        _record(gradient_amaxes, own)
    weight = operations.quantize_transposed(weight_OI, weight_amax, FORWARD)
    if not x_values.numel():
        grad = operations.quantize_tensor(grad_MO, amax, BACKWARD)
        return operations.matmul_tensors(grad, weight, dtype), weight_OI.new_empty(0)
    grad, across = operations.quantize_both(grad_MO, amax, BACKWARD)
    x = FP8Tensor(x_values.view(FORWARD), tensor_scale(x_amax, FORWARD))
    grad_weight = operations.matmul_tensors(across, x, dtype).to(weight_OI.dtype)
    return operations.matmul_tensors(grad, weight, dtype), grad_weight


@_product.register_fake
def _(
    x_MI: Tensor,
    weight_OI: Tensor,
    _x_amax: Tensor,
    _weight_amax: Tensor,
    _gradient_amaxes: Tensor,
    _delayed_scaling: bool,
    _rounds: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    tokens, width = x_MI.shape
    shape = (width, -(-tokens // SIZE_MULTIPLE) * SIZE_MULTIPLE) if keep else (0,)
    values = x_MI.new_empty(shape, dtype=torch.uint8)
    return x_MI.new_empty(x_MI.shape[0], weight_OI.shape[0]), values


@_product_backward.register_fake
def _(
    grad_MO: Tensor,
    weight_OI: Tensor,
    x_values: Tensor,
    _x_amax: Tensor,
    _weight_amax: Tensor,
    _gradient_amaxes: Tensor,
    _delayed_scaling: bool,
) -> tuple[Tensor, Tensor]:
    grad_weight = torch.empty_like(weight_OI) if x_values.numel() else weight_OI.new_empty(0)
    return grad_MO.new_empty(grad_MO.shape[0], weight_OI.shape[1]), grad_weight


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight, x_amax, weight_amax, ctx.gradient_amaxes, ctx.delayed_scaling, _, _ = inputs
    # the history is changed in backward, so it is not a saved tensor
    ctx.save_for_backward(weight, output[1], x_amax, weight_amax)


def _differentiate(ctx: Any, grad_MO: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads = _product_backward(grad_MO.contiguous(), *ctx.saved_tensors, ctx.gradient_amaxes, ctx.delayed_scaling)
    grad_x, grad_weight = (grad if grad.numel() else None for grad in grads)
    return grad_x, grad_weight, *(None,) * 6


_product.register_autograd(_differentiate, setup_context=_save_for_backward)
