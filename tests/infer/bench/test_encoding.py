"""`longvideo bench encode`: parts that are equal to the whole, and the time that ranks save."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from longvideo.cli.main import main
from longvideo.infer.bench.encoding import time_encoding
from longvideo.vae.config import AutoencoderConfig


def test_parts_make_up_the_whole() -> None:
    config = AutoencoderConfig.tiny()
    timing = time_encoding(config, latents=48, ranks=2, size=(32, 32), device=torch.device("cpu"), dtype=torch.float32)
    assert timing.halo == 20 and timing.relative_error < 1e-5
    # latents 24 to 47, 20 latents before them, and one frame before those, which the encoder takes as the first
    assert timing.part_frames == [4 * 23 + 1, 4 * 44 + 1]
    assert timing.saved_seconds == timing.whole_seconds - max(timing.part_seconds)


def test_ranks_that_do_not_divide_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "encode", "--preset", "tiny", "--device", "cpu", "--chunks", "1"]
    assert main([*arguments, "--ranks", "3"]) == 2
    assert "--ranks is 3; expected a divisor of 8" in capsys.readouterr().err
    out = tmp_path / "encode.json"
    assert main([*arguments, "--out", str(out)]) == 0
    assert json.loads(out.read_text())["part_frames"] == [13, 29] and "saved" in capsys.readouterr().out
