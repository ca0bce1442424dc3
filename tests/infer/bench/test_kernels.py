"""The measurement of kernels: its refusal to time a wrong result."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longvideo.infer.bench import kernels
from longvideo.kernels.kv_dequant import reference
from longvideo.kernels.kv_dequant.format import QuantizedSlots
from longvideo.model.config import PRESETS
from longvideo.model.spec import ChunkSpec

SPEC = ChunkSpec(grid_height=1, grid_width=2, chunk_frames=8, window_frames=24, sink_frames=0, pin_shots=False)


def test_nothing_is_timed_on_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    correct, calls = reference.rebuild, []

    def wrong_at_first(
        slots: QuantizedSlots, which: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        correct(slots, which, cos, sin, keys, values)
        calls.append(which)
        if len(calls) == 1:
            keys[0, 0, 3, 1, 7] += 1

    monkeypatch.setattr(reference, "rebuild", wrong_at_first)
    monkeypatch.setattr(kernels, "median_ms", lambda *_arguments, **_options: 1.0)
    with pytest.raises(kernels.KernelMismatch, match="1 values differ"):
        kernels.time_kernels(PRESETS["tiny"], SPEC, device=torch.device("cpu"))
