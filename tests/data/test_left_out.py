"""Everything that encoding leaves out is named by checking the manifest, whatever the reason."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from longvideo.cli.main import main
from longvideo.data.encoded import EncodedDataset
from tests.checkpoint import small

from . import footage

WHOLE = {"start": 0, "end": 125, "caption": "a red ball"}
GOOD = {"video": "good.mp4", "fps": 24, "num_frames": 125, "shots": [WHOLE]}
FIRST = WHOLE | {"end": 45}
"""The first chunk and half of the second."""


def line(name: str, count: int, **values: object) -> dict[str, object]:
    return GOOD | {"video": name, "num_frames": count, "shots": [WHOLE | {"end": count}]} | values


# the lines after a good one with two clips of 2 chunks; what checking prints; what encoding prints, and the clips that
# it plans and skips, or None if it refuses the manifest
REASONS: dict[str, tuple[list[dict[str, object]], str, str, tuple[int, int] | None]] = {
    "too short": (
        [line("short.mp4", 40)],
        ":2: too short: 40 frames at 24 a second, expected 61 for a clip of 2 chunks",
        "1 video left out, too short or without captions; `longvideo data validate --chunks 2` lists them",
        (2, 0),
    ),
    "a sample too short": (
        [line("short.mp4", 40, sample="a"), line("tiny.mp4", 20, sample="a")],
        ":2: too short: the 2 files of its sample give 29 of their 60 frames",
        "2 videos left out, too short or without captions",
        (2, 0),
    ),
    "a file of a sample too short": (
        [line("long.mp4", 125, sample="a"), line("tiny.mp4", 20, sample="a")],
        ":3: too short: 20 frames at 24 a second, expected 32 for one chunk of its sample",
        "1 video left out, too short or without captions",
        (4, 0),
    ),
    "no clip with captions": (
        [line("long.mp4", 125, shots=[FIRST | {"end": 40}])],
        ":2: no clip: no 2 chunks in a row are covered by shots to at least a half",
        "1 video left out, too short or without captions",
        (2, 0),
    ),
    "a clip without captions": (
        [line("long.mp4", 125, shots=[FIRST])],
        "1 clip is left out, because shots cover less than half of a chunk (1 video)",
        "1 clip is left out, because shots cover less than half of a chunk (1 video)",
        (3, 0),
    ),
    "damage in the middle": (
        [line("damaged.mp4", 125)],
        ":2: {folder}/damaged.mp4 is damaged after",
        "damaged.mp4 is damaged after",
        (4, 1),
    ),
    "a file that is cut": (
        [line("cut.mp4", 125)],
        ":2: {folder}/cut.mp4 is not a video in a supported format",
        "cut.mp4 is not a video in a supported format",
        (4, 2),
    ),
    "numbers of another file": (
        [line("long.mp4", 150)],
        ":2: num_frames is 150, expected 125 as in {folder}/long.mp4",
        "num_frames is 150, expected 125 as in {folder}/long.mp4",
        None,
    ),
    "a file that cannot be read and has no numbers": (
        [{"video": "cut.mp4", "shots": [{"caption": "a red ball"}]}],
        ":2: {folder}/cut.mp4 is not a video in a supported format",
        "{folder}/cut.mp4 is not a video in a supported format",
        None,
    ),
    "an error in a line": (
        [line("absent.mp4", 125)],
        ":2: there is no video {folder}/absent.mp4",
        "manifest.jsonl:2: there is no video {folder}/absent.mp4",
        None,
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("footage")
    for name, count in (("good", 125), ("long", 125), ("short", 40), ("tiny", 20), ("damaged", 125)):
        footage.write(out / f"{name}.mp4", count)
    footage.damage(out / "damaged.mp4")
    data = (out / "long.mp4").read_bytes()
    (out / "cut.mp4").write_bytes(data[: len(data) // 2])
    small.save(out / "model")
    return out


@pytest.mark.parametrize("reason", REASONS)
def test_checking_names_what_encoding_leaves_out(
    reason: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, checked, printed, clips = REASONS[reason]
    manifest, out = folder / "manifest.jsonl", tmp_path / "clips"
    manifest.write_text("".join(json.dumps(entry) + "\n" for entry in (GOOD, *lines)))
    model = ["--model", str(folder / "model"), "--chunks", "2"]
    code = main(["data", "validate", str(manifest), *model, "--frames"])
    output = capsys.readouterr().out
    assert checked.format(folder=folder) in output
    assert code == (0 if checked.startswith("1 clip") else 2)
    code = main(["data", "encode", str(manifest), *model, "--device", "cpu", "--workers", "0", "--output", str(out)])
    assert printed.format(folder=folder) in capsys.readouterr().err
    if clips is None:
        assert code == 2
        return
    assert code == 0
    dataset = EncodedDataset.open(out)
    assert (dataset.info.num_clips, len(dataset.skipped)) == clips
    # the same number of clips, but for those of files that cannot be read
    (good,) = re.findall(r"(\d+) clips of 2 chunks", output)
    files = {clip.source[0].video.name for clip in dataset.skipped}
    left = [clip for clip in dataset.clips if clip.source[0].video.name not in files]
    assert int(good) == len(left)


def test_nothing_is_named_if_nothing_is_left_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = folder / "good.jsonl"
    manifest.write_text(json.dumps(GOOD) + "\n")
    model = ["--model", str(folder / "model"), "--chunks", "2"]
    assert main(["data", "validate", str(manifest), *model, "--frames"]) == 0
    assert "left out" not in capsys.readouterr().out
    out = str(tmp_path / "clips")
    assert main(["data", "encode", str(manifest), *model, "--device", "cpu", "--workers", "0", "--output", out]) == 0
    assert "2 clips, 0 damaged and left out" in capsys.readouterr().err
