"""`longvideo generate` with ranks that share the denoising, against one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from longvideo.cli.main import main

PROMPTS = ["a red ball bounces", "a blue square spins"]
OPTIONS = ["--device", "cpu", "--seconds", "3", "--steps", "1"]


def torchrun(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "longvideo.cli.main", "generate", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_two_ranks_write_the_video_of_one(tmp_path: Path) -> None:
    both, alone = tmp_path / "both.mp4", tmp_path / "alone.mp4"
    run = torchrun([*PROMPTS, *OPTIONS, "-o", str(both)])
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("both.mp4: 72 frames") == 1
    assert main(["generate", *PROMPTS, *OPTIONS, "-o", str(alone)]) == 0
    result, expected = (iio.imread(path).astype(int) for path in (both, alone))
    assert result.shape == expected.shape
    # products of other shapes are rounded differently
    assert np.abs(result - expected).mean() < 2


def test_a_gpu_cannot_be_chosen_for_several_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["generate", PROMPTS[0], "--device", "cuda:1", "-o", str(tmp_path / "a.mp4")]) == 2
    assert "expected cpu or cuda, the GPU of each rank's number" in capsys.readouterr().err
