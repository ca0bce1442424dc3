"""The peak of the memory that torch reserves on GPUs, and the limit to it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from longvideo.errors import UserError
from longvideo.infer.bench.reserved_memory import GB, ReservedMemory

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


class FakeGPU:
    """Torch's counters of one GPU of 80 GB."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fraction, self.peak, self.resets = 1.0, 0, 0
        values = {
            "get_device_properties": lambda _gpu: SimpleNamespace(total_memory=80 * GB),
            "set_per_process_memory_fraction": lambda fraction, _gpu: setattr(self, "fraction", fraction),
            "max_memory_reserved": lambda _gpu: self.peak,
            "reset_peak_memory_stats": lambda _gpu: setattr(self, "peak", 0),
            "empty_cache": lambda: None,
        }
        for name, value in values.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_the_peak_is_that_of_all_parts_with_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU(monkeypatch)
    memory = ReservedMemory([GPU, CPU, GPU])
    for peak in (5 * GB, 9 * GB, 7 * GB):
        gpu.peak = peak
        memory.begin_part()
    assert gpu.peak == 0 and memory.peaks() == {"cuda:0": 10 * GB}
    gpu.peak = 11 * GB
    assert memory.peaks() == {"cuda:0": 12 * GB} and gpu.fraction == 1.0


def test_the_limit_leaves_room_for_the_context_and_is_lifted_where_nothing_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = FakeGPU(monkeypatch)
    memory = ReservedMemory([GPU], limit=24)
    assert gpu.fraction == pytest.approx(23 / 80)
    gpu.peak = 3 * GB
    with pytest.raises(RuntimeError, match="in the block"), memory.suspended():
        assert gpu.fraction == 1.0
        gpu.peak = 70 * GB
        raise RuntimeError("in the block")
    assert gpu.fraction == pytest.approx(23 / 80) and memory.peaks() == {"cuda:0": 4 * GB}


@pytest.mark.parametrize("limit", [0.5, 1.0, 81.0, float("nan")])
def test_a_limit_that_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch, limit: float) -> None:
    FakeGPU(monkeypatch)
    with pytest.raises(UserError, match=r"expected more than 1 GB, .* and at most the 80\.0 GB of cuda:0"):
        ReservedMemory([GPU], limit=limit)
    with pytest.raises(UserError, match="there is no GPU; leave it out"):
        ReservedMemory([CPU], limit=limit)
