"""`longvideo eval decoder` measures the difference of two decoders, and its growth."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from longvideo.cli.main import main
from longvideo.infer.decoder_comparison import DecoderComparison


@pytest.fixture(scope="module")
def latents(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    file = folder / "ball.safetensors"
    options = ["--model", str(model_folder), "--seconds", "2.6", "--device", "cpu", "--decoder-precision", "fp32"]
    assert main(["generate", "a red ball", *options, "--latents", str(file), "-o", str(folder / "ball.mp4")]) == 0
    return file


def measured(latents: Path, out: Path, *options: str) -> dict[str, Any]:
    assert main(["eval", "decoder", str(latents), "--device", "cpu", "-o", str(out), *options]) == 0
    (video,) = json.loads(out.read_text())["videos"]
    return video


def test_a_decoder_equals_itself_and_bf16_is_near(
    latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = measured(latents, tmp_path / "same.json", "--decoder-precision", "fp32")
    assert same["errors"] == [0, 0, 0, 0] and same["psnr"] is None
    assert "inf dB" in capsys.readouterr().out
    near = measured(latents, tmp_path / "near.json", "--decoder-precision", "bf16")
    assert all(0 < error < 10 for error in near["errors"])


def test_the_ends_of_a_video_show_growth() -> None:
    comparison = DecoderComparison("", (100.0, *(float(part) for part in range(1, 20))))
    assert comparison.first_psnr == pytest.approx(10 * math.log10(255**2 / 1.5))
    assert comparison.last_psnr == pytest.approx(10 * math.log10(255**2 / 18.5))
    assert comparison.psnr == pytest.approx(10 * math.log10(255**2 / 14.5))


def test_latents_without_a_model_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    np.save(tmp_path / "x.npy", np.zeros((24, 2, 2, 3), np.float32))
    assert main(["eval", "decoder", str(tmp_path / "x.npy"), "--device", "cpu"]) == 2
    assert "states no model; use --model with the model that made the latents" in capsys.readouterr().err
