"""Seeds of stochastic rounding."""

from __future__ import annotations

import torch

from longvideo.quantization.training.seeds import RoundingSeeds

CPU = torch.device("cpu")


def test_seeds_are_those_of_their_generator_and_all_differ() -> None:
    drawn, again = RoundingSeeds(3, CPU), RoundingSeeds(3, CPU)
    assert drawn.values.unique().numel() == 6
    drawn.draw(torch.Generator().manual_seed(5))
    again.draw(torch.Generator().manual_seed(5))
    assert torch.equal(drawn.values, again.values) and drawn.values.unique().numel() == 6
