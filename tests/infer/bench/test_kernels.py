"""`longvideo bench`: its reports, and its refusal to time a wrong result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longvideo.cli.main import main
from longvideo.infer.bench import kernels
from longvideo.kernels.kv_dequant import reference
from longvideo.kernels.kv_dequant.format import QuantizedSlots
from longvideo.model.config import PRESETS
from longvideo.model.spec import ChunkSpec

SPEC = ChunkSpec(grid_height=1, grid_width=2, chunk_frames=8, window_frames=24, sink_frames=0, pin_shots=False)


def test_the_report_has_every_kernel_with_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("longvideo.infer.bench.timing.CPU_REPEATS", 1)
    monkeypatch.setattr("longvideo.infer.bench.timing.CPU_COPY_BYTES", 2**16)
    out = tmp_path / "kernels.json"
    assert main(["bench", "kernels", "--device", "cpu", "--out", str(out)]) == 0
    assert "rebuild keys and values of a layer" in capsys.readouterr().out
    rows = {(row["kernel"], row["size"]): row for row in json.loads(out.read_text())["kernels"]}
    # 224 x 256 inputs of 2 bytes, read twice, and codes and scales of 9/16 of a byte
    assert rows["quantize adaptive", "224 x 256"]["needed_bytes"] == 224 * 256 * (4 + 9 / 16)
    # keys and values of two chunks of 224 tokens, 8 heads of 32
    assert rows["rebuild keys and values of a layer", "2 of 3 chunks"]["needed_bytes"] == 4 * 224 * 256 * (2 + 9 / 16)
    assert all(row["ms"] > 0 and row["share"] > 0 for row in rows.values())


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


def test_an_unknown_preset_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", "--preset", "huge"]) == 2
    assert "preset is 'huge'; expected one of wan2.2-ti2v-5b, tiny" in capsys.readouterr().err


def test_loading_holds_the_packed_weights_and_no_more(tmp_path: Path) -> None:
    out = tmp_path / "load.json"
    assert main(["bench", "load", "--device", "cpu", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    # 15.4 MiB in bfloat16; the file has a header on top of the tensors
    assert report["model_bytes"] <= report["file_bytes"] < 1.05 * report["model_bytes"] < 6 * 2**20
