"""Folders in LongLive 2.0's layout become a manifest whose clips continue from shot to shot."""

import json
from pathlib import Path

import pytest
import torch

from longvideo.cli.main import main
from longvideo.data.clips import ClipSpec, plan_clips, read_clip
from longvideo.data.longlive import NO_CAPTION, NO_VIDEO, UNNUMBERED, UNREADABLE, read_longlive
from longvideo.data.manifest import read_manifest
from longvideo.data.validation import validate_manifest
from longvideo.data.video import VideoReader
from longvideo.errors import UserError

from . import footage

SIZE = (64, 96)


def shot(folder: Path, sample: str, number: int, *, frames: int = 0, caption: str | None = None) -> None:
    if frames:
        footage.write(folder / "video" / sample / f"{number}.mp4", frames, brightness=20 * number)
    if caption is not None:
        path = folder / "caption" / sample / f"{number}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"caption": caption}))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Sample "walk" has shots 2 and 10, in this order, "run" has one."""
    folder = tmp_path / "data"
    shot(folder, "walk", 10, frames=40, caption="he stops")
    shot(folder, "walk", 2, frames=70, caption="a man walks")
    shot(folder, "run", 0, frames=30, caption="a dog runs")
    return folder


def test_a_folder_becomes_a_manifest(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "manifest.jsonl"
    assert main(["data", "import-longlive", str(data), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 2 samples, 3 shots, 0.002 hours; 0 files left out\n"
    assert [json.loads(line)["video"] for line in out.read_text().splitlines()] == [
        "data/video/run/0.mp4",
        "data/video/walk/2.mp4",
        "data/video/walk/10.mp4",
    ]
    entries = read_manifest(out)
    assert [(entry.sample, entry.fps, entry.num_frames) for entry in entries] == [
        ("run", 24, 30),
        ("walk", 24, 70),
        ("walk", 24, 40),
    ]
    assert [entry.shots[0].caption for entry in entries] == ["a dog runs", "a man walks", "he stops"]
    assert validate_manifest(out, ClipSpec(1)).problems == ()
    (reference,) = plan_clips(entries, ClipSpec(3))
    assert reference.captions == ("a man walks", "a man walks", "he stops")
    assert reference.cuts == (True, False, True)
    frames = read_clip(reference, size=SIZE).frames
    expected = [VideoReader().read(entry.video)[:count] for entry, count in zip(entries[1:], (61, 32), strict=True)]
    assert torch.equal(frames, torch.cat(expected))


def test_what_is_missing_is_named_and_counted(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shot(data, "walk", 3, frames=30)
    shot(data, "walk", 4, frames=30, caption=" ")
    shot(data, "run", 5, caption="no one runs")
    shot(data, "gone", 0, caption="nothing")
    (data / "video" / "run" / "1.mp4").write_bytes(b"no video")
    shot(data, "run", 1, caption="noise")
    (data / "video" / "run" / "notes.txt").write_text("")
    _, left_out = read_longlive(data)
    assert sorted((file.kind, file.file.relative_to(data).as_posix()) for file in left_out) == [
        (UNREADABLE, "video/run/1.mp4"),
        (NO_CAPTION, "video/walk/3.mp4"),
        (NO_CAPTION, "video/walk/4.mp4"),
        (NO_VIDEO, "caption/gone/0.json"),
        (NO_VIDEO, "caption/run/5.json"),
        (UNNUMBERED, "video/run/notes.txt"),
    ]
    out = data / "manifest.jsonl"
    assert main(["data", "import-longlive", str(data), "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert lines[-1].endswith(
        "2 samples, 3 shots, 0.002 hours; 6 files left out, 1 with 'cannot be read', 2 with 'no caption', "
        "2 with 'no video', 1 with 'not a numbered file'"
    )
    assert len(read_manifest(out)) == 3


def test_other_layouts_and_existing_manifests_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="there is no folder .*data/video/video; expected"):
        read_longlive(data / "video")
    for part in ("video", "caption"):
        (tmp_path / "empty" / part).mkdir(parents=True)
    with pytest.raises(UserError, match="has no shot"):
        read_longlive(tmp_path / "empty")
    out = tmp_path / "manifest.jsonl"
    out.write_text("old")
    assert main(["data", "import-longlive", str(data), "--out", str(out)]) == 2
    assert "exists; choose another name or add --overwrite" in capsys.readouterr().err
    assert out.read_text() == "old"
    assert main(["data", "import-longlive", str(data), "--out", str(out), "--overwrite"]) == 0
    assert len(read_manifest(out)) == 3


def test_captions_have_no_byte_order_mark_and_half_characters_are_left_out(data: Path) -> None:
    caption = data / "caption" / "walk" / "10.json"
    caption.write_bytes(b"\xef\xbb\xbf" + caption.read_bytes())
    (data / "caption" / "walk" / "2.json").write_text('{"caption": "a man \\ud83d"}')
    (data / "caption" / "run" / "0.json").write_bytes(b'{"caption": "a d\xf6g"}')
    entries, left_out = read_longlive(data)
    assert [shot.caption for entry in entries for shot in entry.shots] == ["he stops"]
    whys = sorted(file.why for file in left_out)
    assert "0.json:1 is not UTF-8 text (byte 0xf6)" in whys[0] and "2.json is not valid text: half a" in whys[1]
