"""Oscillation of weights between two numbers in 4 bits: its measure, and periods of updates that follow from it.

Source: "Oscillation-Reduced MXFP4 Training for Vision Transformers" (TetraJet, arXiv 2502.20853), section 6 and
algorithm 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

PATHS = ("last_weight", "last_rounded", "path", "rounded_path")
"""States of a measured weight: where it and its rounding were in the last step, and how far each has gone."""


class Paths:
    """How far every weight of a tensor and its rounding have moved, float32: sums of absolute changes over steps.

    states: tensors by the names of `PATHS`.
    """

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        self.states = {name: torch.zeros(shape, device=device) for name in PATHS}

    def begin(self, weight: Tensor, rounded: Tensor) -> None:
        """Begin a measurement at these weights and their rounding."""
        self._remember(weight, rounded)
        self.states["path"].zero_()
        self.states["rounded_path"].zero_()

    def add(self, weight: Tensor, rounded: Tensor) -> None:
        """Add the changes of a step that led to these weights and their rounding."""
        self.states["path"] += (weight.float() - self.states["last_weight"]).abs_()
        self.states["rounded_path"] += (rounded - self.states["last_rounded"]).abs_()
        self._remember(weight, rounded)

    def ratios(self) -> Tensor:
        """Return R, the path of the rounded weight divided by that of the weight; 0 for a weight that has not moved."""
        path = self.states["path"]
        return torch.where(path > 0, self.states["rounded_path"] / path, 0.0)

    def _remember(self, weight: Tensor, rounded: Tensor) -> None:
        self.states["last_weight"].copy_(weight)
        self.states["last_rounded"].copy_(rounded)


def update_periods(ratios: Tensor, *, unit: float, gain: int, most: int) -> Tensor:
    """Return the number of gradients to average for each update: min(gain floor(R / unit) + 1, most), float32."""
    return (gain * torch.floor(ratios / unit) + 1).clamp_(max=float(most))
