"""Linear layers that train in NVFP4 or FP8 with the products of TransformerEngine.

Shapes: M tokens, I inputs, O outputs, H steps of a history.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longvideo.kernels import te
from longvideo.kernels.fp8.format import SIZE_MULTIPLE
from longvideo.kernels.fp8.reference import tensor_scale
from longvideo.kernels.fp8.te import recipe_by_scales
from longvideo.quantization.training.fp8 import BACKWARD, FORWARD, GRADIENT, HISTORY, INPUT, WEIGHT
from longvideo.quantization.training.phase import TrainingPhase

if TYPE_CHECKING:
    from collections.abc import Callable

FORMATS = {INPUT: FORWARD, WEIGHT: FORWARD, GRADIENT: BACKWARD}


class TETrainingLinear(nn.Linear):
    """`nn.Linear` with the parameters of another one, whose three products TransformerEngine computes by a recipe.

    recipe: recipe of TransformerEngine; the layer enters it itself, so that a pass that is recomputed does the same.
    phase: `TrainingPhase.BOTH`, or `TrainingPhase.NEITHER`, in which the layer is a plain `nn.Linear`.
    The number of tokens is padded with zeros to a multiple of 16, which changes no product. Under autocast, inputs are
    rounded to its dtype first, but weights are not. torch.compile does not look into the layer.
    Raises ValueError unless inputs and outputs are multiples of 16.
    """

    def __init__(self, linear: nn.Linear, recipe: Any) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        if linear.in_features % SIZE_MULTIPLE or linear.out_features % SIZE_MULTIPLE:
            raise ValueError(
                f"the layer has {linear.in_features} inputs and {linear.out_features} outputs; expected multiples of"
                f" {SIZE_MULTIPLE} for TransformerEngine"
            )
        self.weight, self.bias = linear.weight, linear.bias
        self.phase = TrainingPhase.BOTH
        self._recipe = recipe
        # in a tuple, since a submodule would have the parameters again under other names
        self._engine = (te.linear_of(self),)

    def forward(self, input: Tensor) -> Tensor:
        if self.phase is TrainingPhase.NEITHER:
            return super().forward(input)
        return _multiply(self, input)

    def multiply(self, input: Tensor) -> Tensor:
        """Return the output, with all products of the layer in low precision."""
        assert self.phase is TrainingPhase.BOTH, "TransformerEngine cannot round the backward pass alone"
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        flat = input.flatten(0, -2)
        tokens, padding = flat.shape[0], -flat.shape[0] % SIZE_MULTIPLE
        with te.autocast(self._recipe):
            output = self._engine[0](F.pad(flat, (0, 0, 0, padding)) if padding else flat)
        # a slice of all tokens would be copied in the backward pass
        return (output[:tokens] if padding else output).unflatten(0, input.shape[:-1])


class TEDelayedLinear(TETrainingLinear):
    """`TETrainingLinear` in FP8 with delayed scaling, by the histories of `FP8TrainingLinear`.

    amaxes: as of `FP8TrainingLinear`; they are set before each step by `set_amaxes`.
    Until the histories can be full, a tensor without one has the scale of its own magnitude; later its scale is 1.
    """

    def __init__(self, linear: nn.Linear) -> None:
        device = linear.weight.device
        amaxes, scales = torch.zeros(3, 1 + HISTORY, device=device), torch.ones(3, device=device)
        super().__init__(linear, recipe_by_scales(scales, amaxes[:, :1]))
        # not buffers, since those of a model in bf16 are cast
        self.amaxes, self._scales = amaxes, scales
        self._steps_to_full_history = 1 + HISTORY

    def set_amaxes(self, amaxes: Tensor) -> None:
        """Set the magnitudes, and so the scales of the next step."""
        self.amaxes.copy_(amaxes)
        self._steps_to_full_history = max(0, self._steps_to_full_history - 1)
        for row in FORMATS:
            self._set_scale(row, torch.zeros((), device=amaxes.device))

    def multiply(self, input: Tensor) -> Tensor:
        if self._steps_to_full_history:
            self._set_scale(INPUT, _magnitude(input))
            self._set_scale(WEIGHT, _magnitude(self.weight))
        if not torch.is_grad_enabled():
            # validation leaves no trace in the history
            of_step = self.amaxes[:, 0].clone()
            output = super().multiply(input)
            self.amaxes[:, 0] = of_step
            return output
        output = super().multiply(input)
        if self._steps_to_full_history and output.requires_grad:
            scaled = _ScaleOfGradient.apply(output, self)
            assert isinstance(scaled, Tensor)
            return scaled
        return output

    def scale_gradient(self, gradient: Tensor) -> None:
        """Set the scale of a gradient that is about to be rounded, from its own magnitude if it has no history."""
        self._set_scale(GRADIENT, _magnitude(gradient))

    def _set_scale(self, row: int, own: Tensor) -> None:
        """Set a scale by the largest magnitude of the history, or by the tensor's own one if there is no history."""
        largest = self.amaxes[row, 1:].amax()
        amax = torch.where(largest > 0, largest, own)
        self._scales[row] = tensor_scale(amax, FORMATS[row]).reciprocal()


class _ScaleOfGradient(torch.autograd.Function):
    """The identity; its gradient sets the scale by which the layer before it rounds that gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, layer: TEDelayedLinear) -> Tensor:
        ctx.layer = layer
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        ctx.layer.scale_gradient(grad)
        return grad, None


def _multiply_by_te(layer: TETrainingLinear, input: Tensor) -> Tensor:
    return layer.multiply(input)


_multiply = cast("Callable[[TETrainingLinear, Tensor], Tensor]", torch.compiler.disable(_multiply_by_te))


def _magnitude(x: Tensor) -> Tensor:
    return x.detach().abs().amax().float()
