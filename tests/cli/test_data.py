"""`longvideo data shapeworld` writes the videos of its scripts, and refuses invalid options in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longvideo.cli.main import main
from longvideo.data.manifest import ShotEntry, read_manifest
from longvideo.data.video import VideoReader
from longvideo.shapeworld.dataset import render_script, sample_script


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "shapes"
    code = main(
        ["data", "shapeworld", "--out", str(out), "--clips", "2", "--seconds", "7", "--shots", "3"]
        + ["--height", "64", "--width", "112", "--seed", "40"]
    )
    assert code == 0
    return out


def test_videos_and_manifest_equal_the_scripts(folder: Path) -> None:
    entries = read_manifest(folder / "manifest.jsonl")
    assert len(entries) == 2
    for seed, entry in zip((40, 41), entries, strict=True):
        script = sample_script(seed, split="train", num_shots=3, num_chunks=6)
        assert (entry.fps, entry.num_frames) == (24.0, 189)
        assert list(entry.shots) == [ShotEntry(s.start, s.end, s.shot.caption) for s in script.frames()]
        rendered = torch.cat(list(render_script(script, height=64, width=112))).float()
        error = (VideoReader().read(entry.video).float() - rendered).square().mean()
        assert 10 * torch.log10(255**2 / error) > 33


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--clips", "0"], "--clips"),
        (["--clips", "1", "--seconds", "0"], "seconds is 0; expected a number above 0"),
        (["--clips", "1", "--seconds", "nan"], "seconds is nan"),
        (["--clips", "1", "--seconds", "1e9"], "at most 86400"),
        (["--clips", "1", "--shots", "9"], "--shots 9 is more than the"),
        (["--clips", "1", "--height", "100"], "--height is 100, expected a multiple of 16; use 96"),
        (["--clips", "1", "--width", "96"], "less than --height"),
        (["--clips", "1", "--split", "test"], "--split"),
    ],
)
def test_invalid_options_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["data", "shapeworld", "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_kept_without_overwrite(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "manifest.jsonl").read_bytes()
    options = ["--clips", "1", "--seconds", "1", "--height", "32", "--width", "64"]
    assert main(["data", "shapeworld", "--out", str(folder), *options]) == 2
    assert "not empty; choose another name or add --overwrite" in capsys.readouterr().err
    assert (folder / "manifest.jsonl").read_bytes() == before
    other = folder.parent / "other"
    for _ in range(2):
        assert main(["data", "shapeworld", "--out", str(other), *options, "--overwrite"]) == 0
    assert read_manifest(other / "manifest.jsonl")[0].num_frames == 29
