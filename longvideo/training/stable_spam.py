"""Stable-SPAM: AdamW on clipped gradients whose norm is smoothed, with resets of its moments (arXiv 2502.17055)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longvideo.training.adamw import ResettingAdamW

if TYPE_CHECKING:
    from collections.abc import Iterable

STATISTICS = "gradient_statistics"
"""State of a parameter: number of its updates, and running means of max |g|, of |g| and of |g|^2."""


class StableSpam(ResettingAdamW):
    """AdamW after AdaClip and AdaGN of the gradient g of each parameter, in its update t, counted from 1.

    AdaClip: T_t = largest_decay T_(t-1) + (1 - largest_decay) max |g|, divided by 1 - largest_decay^t; a value with
    |g_i| > T becomes g_i T / max |g|. AdaGN, with n the norm of the result: the running means m of n (`norm_decay`)
    and v of n^2 (`norm_square_decay`), both with bias correction, replace n by m / (sqrt(v) + eps). Resets keep these
    statistics. They need the whole gradient of a parameter, so the optimizer cannot work on shards.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        largest_decay: float,
        norm_decay: float,
        norm_square_decay: float,
        **resetting: Any,
    ) -> None:
        super().__init__(parameters, **resetting)
        self.decays = (largest_decay, norm_decay, norm_square_decay)

    def more_states(self, parameter: nn.Parameter) -> dict[str, torch.Size]:
        del parameter
        return {STATISTICS: torch.Size((1 + len(self.decays),))}

    def transform(self, parameter: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        gradient = parameter.grad
        assert gradient is not None
        before = state[STATISTICS]
        count = before[0] + 1
        of_largest, of_norm, of_square = self.decays
        largest = gradient.abs().amax().float()
        bound, mean_largest = _running_mean(before[1], largest, of_largest, count)
        gradient.copy_(torch.where(gradient.abs() > bound, gradient * (bound / largest), gradient))
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        mean, mean_norm = _running_mean(before[2], norm, of_norm, count)
        square, mean_square = _running_mean(before[3], norm.square(), of_square, count)
        factor = mean / (square.sqrt() + group["eps"]) / norm
        gradient.mul_(torch.where(norm > 0, factor, 0.0))
        after = torch.stack((count, mean_largest, mean_norm, mean_square))
        state[STATISTICS].copy_(torch.where(self.skipped(parameter.device) > 0, before, after))


def _running_mean(before: Tensor, value: Tensor, decay: float, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return a running mean with bias correction, and without."""
    mean = decay * before + (1 - decay) * value
    # 1 - decay ** count, exact in float32 for a decay near 1
    return mean / -torch.expm1(count * math.log(decay)), mean
