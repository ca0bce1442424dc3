"""Random weights, of which only some are drawn and then repeated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

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


class Tied(nn.Module):
    """An embedding under two names, as in UMT5."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(500, 40)
        self.encoder = nn.Module()
        self.encoder.embed_tokens = self.shared


class AllocatedBytes(TorchDispatchMode):
    """Adds up the bytes of all new tensors that are not on the meta device."""

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if "empty" in str(func) and not result.is_meta:
            self.total += result.nbytes
        return result


def test_a_module_with_two_names_gets_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_weights, "MOST_DRAWN", 1)
    with AllocatedBytes() as allocated:
        module = random_weights.random_weights(Tied, CPU, torch.bfloat16)
    assert module.shared is module.encoder.embed_tokens
    assert allocated.total == module.shared.weight.nbytes + 2
