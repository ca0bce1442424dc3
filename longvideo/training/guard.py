"""Keep steps with a senseless loss away from the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

DECAY = 0.98
WARMUP = 20  # losses before any can be a spike


class LossGuard:
    """Turns a loss that is far above its running mean into NaN, so that the step is skipped as one that is not finite.

    factor: a spike is this many times the mean; 0 lets every loss pass. The mean stays on the device and leaves spikes
    out, so nothing waits for it.
    """

    def __init__(self, factor: float, device: torch.device):
        self.factor = factor
        self.mean = torch.zeros((), device=device)
        self.count = torch.zeros((), device=device)

    def __call__(self, loss: Tensor) -> Tensor:
        if not self.factor:
            return loss
        value = loss.detach().float()
        is_bad = ~(value <= torch.where(self.count < WARMUP, torch.inf, self.factor * self.mean))
        decay = torch.where(self.count == 0, 0.0, DECAY)
        self.mean = torch.where(is_bad, self.mean, decay * self.mean + (1 - decay) * value)
        self.count = self.count + (~is_bad).float()
        return loss * torch.where(is_bad, torch.nan, 1.0)

    def state(self) -> dict[str, float]:
        return {"loss_mean": float(self.mean), "loss_count": float(self.count)}

    def load(self, state: Mapping[str, float]) -> None:
        self.mean.fill_(state["loss_mean"])
        self.count.fill_(state["loss_count"])
