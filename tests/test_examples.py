"""The programs in examples/ run as they are, at small sizes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from longvideo.checkpoint.folder import ModelFolder
from longvideo.cli.main import main
from longvideo.data.video import probe_video

EXAMPLES = Path(__file__).parent.parent / "examples"
MAX_LINES = 39


def run(name: str, *arguments: str, folder: Path) -> str:
    """Run an example in a folder, with this environment's programs, and return what it printed."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash" if name.endswith(".sh") else sys.executable, str(EXAMPLES / name), *arguments]
    environment = {**os.environ, "PATH": programs, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_examples_are_short_and_all_are_run_here() -> None:
    tests = Path(__file__).read_text(encoding="utf-8")
    files = [path for path in sorted(EXAMPLES.iterdir()) if path.is_file()]
    assert len(files) >= 7
    for path in files:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES, path.name
        assert f'run("{path.name}"' in tests, f"add a test that runs {path.name}"


def test_stream_writes_three_shots_as_they_are_generated(tmp_path: Path) -> None:
    printed = run("stream.py", "--seconds", "1.33", "--steps", "1", folder=tmp_path).splitlines()
    assert printed == [f"stream.mp4: {frames} frames" for frames in (1, 29, 61, 93, 96)]
    assert probe_video(tmp_path / "stream.mp4").num_frames == 96


def test_first_picture_becomes_the_first_frame(tmp_path: Path) -> None:
    assert "12 frames" in run("first_picture.py", "--seconds", "0.5", "--steps", "1", folder=tmp_path)
    assert probe_video(tmp_path / "first_picture.mp4").num_frames == 12


def test_community_pipeline_is_loaded_by_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    printed = run("community_pipeline.py", "--frames", "12", "--steps", "1", folder=tmp_path).splitlines()
    assert printed == [f"community.mp4: {frames} frames" for frames in (1, 12)]
    assert probe_video(tmp_path / "community.mp4").num_frames == 12


@pytest.mark.slow
def test_steer_returns_to_an_earlier_chunk(tmp_path: Path) -> None:
    printed = run("steer.py", "--steps", "1", folder=tmp_path)
    chunk = int(printed.split("blue from chunk ")[1].split(",")[0])
    frames = 29 + 32 * (chunk + 2)
    assert f"{frames} frames" in printed and probe_video(tmp_path / "steer.mp4").num_frames == frames


@pytest.mark.slow
def test_low_precision_stays_near_the_pictures_in_16_bits(tmp_path: Path) -> None:
    printed = run("low_precision.py", "--seconds", "0.5", "--steps", "2", folder=tmp_path)
    decibels = {name: float(rest.split()[0]) for name, rest in (line.split(": ") for line in printed.splitlines())}
    assert len(decibels) == 4 and decibels.pop("bf16") == float("inf")
    assert all(15 < value < 60 for value in decibels.values())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_own_videos_trains_a_model_that_generates(tmp_path: Path) -> None:
    assert main(["data", "shapeworld", "--clips", "2", "--seconds", "2.6", "--output", str(tmp_path / "footage")]) == 0
    stages = "stages=[{chunks: 2, batch: 1, steps: 1}]"
    run("own_videos.sh", "footage/manifest.jsonl", "result", stages, "trainer.save_every=1", folder=tmp_path)
    assert probe_video(tmp_path / "result" / "result.mp4").num_frames == 48


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_distill_makes_a_model_and_an_adapter_that_merges(tmp_path: Path) -> None:
    run("distill.sh", "result", "stages=[{frames: 8, batch: 1, steps: 1}]", folder=tmp_path)
    assert probe_video(tmp_path / "result" / "distilled.mp4").num_frames == 48
    packed = ModelFolder.open(str(tmp_path / "result" / "packed"))
    assert packed.is_packed and packed.settings.steps == 2
