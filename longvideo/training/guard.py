"""Skip steps whose loss is far above those before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.distributed import Mesh

if TYPE_CHECKING:
    from collections.abc import Mapping

DECAY = 0.98
"""Decay of the running mean of the loss for each step."""
WARMUP = 20
"""Number of losses before any can be a spike."""


class LossGuard:
    """Replaces a loss far above its running mean by NaN, so that the step is skipped like one that is not finite.

    factor: ratio to the mean above which a loss is a spike; 0 lets every loss pass. mesh: ranks whose losses of a pass
    are averaged and judged together. The mean stays on the device and leaves spikes out, so the host waits for nothing.
    """

    def __init__(self, factor: float, device: torch.device, mesh: Mesh | None = None) -> None:
        self.factor = factor
        self.mesh = mesh or Mesh()
        self.mean = torch.zeros((), device=device)
        self.count = torch.zeros((), device=device)

    def __call__(self, loss: Tensor) -> Tensor:
        """Return the loss of a pass, or NaN if it is a spike. All ranks call it together."""
        if not self.factor:
            return loss
        value = self.mesh.sum(loss.detach().float().clone()) / self.mesh.world
        is_bad = ~(value <= torch.where(self.count < WARMUP, torch.inf, self.factor * self.mean))
        decay = torch.where(self.count == 0, 0.0, DECAY)
        self.mean = torch.where(is_bad, self.mean, decay * self.mean + (1 - decay) * value)
        self.count = self.count + (~is_bad).float()
        return loss * torch.where(is_bad, torch.nan, 1.0)

    def state(self) -> dict[str, float]:
        """Return the numbers that `load` restores, equal on all ranks."""
        return {"loss_mean": float(self.mean), "loss_count": float(self.count)}

    def load(self, state: Mapping[str, float]) -> None:
        """Restore what `state` returned."""
        self.mean.fill_(state["loss_mean"])
        self.count.fill_(state["loss_count"])
