"""Random weights, of which only some are drawn and then repeated."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from longvideo.infer.bench import random_weights
from longvideo.infer.bench.random_weights import DEVIATION

CPU = torch.device("cpu")


@pytest.mark.parametrize("most_drawn", [11, 101, 2**20])
def test_every_parameter_is_filled_and_layers_differ(monkeypatch: pytest.MonkeyPatch, most_drawn: int) -> None:
    monkeypatch.setattr(random_weights, "MOST_DRAWN", most_drawn)
    module = random_weights.random_weights(
        lambda: nn.Sequential(nn.Linear(20, 30), nn.Linear(20, 30)), CPU, torch.bfloat16
    )
    first, _, second, _ = module.parameters()
    assert first.dtype == torch.bfloat16 and not first.requires_grad
    assert not torch.equal(first, second) and len(first.unique()) <= most_drawn
    values = torch.cat([x.flatten() for x in module.parameters()]).float()
    assert values.isfinite().all() and (values != 0).all()
    if most_drawn > len(values):
        assert values.std().item() == pytest.approx(DEVIATION, rel=0.1)
