"""SPAM: AdamW that clips spikes of single gradient values and resets its moments (arXiv 2501.06842)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longvideo.checkpoint.run_checkpoint import MOMENTS, STEP
from longvideo.training.adamw import ResettingAdamW

if TYPE_CHECKING:
    from collections.abc import Iterable

PIECE = 2**24
"""Number of rows whose bounds are computed at once, which limits the memory of a flat shard of all weights."""


class Spam(ResettingAdamW):
    """AdamW in which a gradient value g with g^2 > spike_ratio v becomes sign(g) sqrt(spike_ratio v).

    v is the running mean of g^2 before this update. After a reset, and at the start, v is far too small for such a
    bound, so that the first `spike_after` updates clip nothing, as in the authors' code. In the same phase the learning
    rate, also that of weight decay, is multiplied by (1 - cos(pi n / reset_warmup)) / 2 in update n, counted from 1,
    until n reaches `reset_warmup`. The bias correction of the moments starts again with them.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        spike_ratio: float,
        spike_after: int,
        reset_warmup: int,
        **resetting: Any,
    ) -> None:
        super().__init__(parameters, **resetting)
        self.spike_ratio, self.spike_after, self.reset_warmup = spike_ratio, spike_after, reset_warmup

    def transform(self, parameter: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        del group
        assert parameter.grad is not None
        without_bound = torch.where(state[STEP] < self.spike_after, math.inf, 0.0)
        rows = parameter.grad if parameter.ndim else parameter.grad[None]
        squares = state[MOMENTS[1]] if parameter.ndim else state[MOMENTS[1]][None]
        for gradient, square in zip(rows.split(PIECE), squares.split(PIECE), strict=True):
            bound = (square * self.spike_ratio).sqrt_().add_(without_bound).to(gradient.dtype)
            torch.clamp(gradient, -bound, bound, out=gradient)

    def rate(self, group: dict[str, Any]) -> float | Tensor:
        first = next((parameter for parameter in group["params"] if parameter.grad is not None), None)
        if first is None or not self.reset_warmup:
            return group["lr"]
        progress = ((self.state[first][STEP] + 1) / self.reset_warmup).clamp(max=1.0)
        return group["lr"] * (1 - torch.cos(math.pi * progress)) / 2
