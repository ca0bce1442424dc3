"""Seeds of the stochastic rounding of training layers."""

from __future__ import annotations

import torch

SEEDS = 2
"""Number of seeds of a layer, one for each product of its backward pass."""


class RoundingSeeds:
    """Seeds of the stochastic rounding of all layers of a model, int64 [layers, 2] on its device.

    Rounding has no other state: with the same seeds a step rounds in the same way.
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        self.values = torch.arange(layers * SEEDS, device=device).view(layers, SEEDS)

    def draw(self, generator: torch.Generator) -> None:
        """Draw new seeds from a generator on the host."""
        drawn = torch.randint(2**62, self.values.shape, generator=generator)
        self.values.copy_(drawn, non_blocking=True)
