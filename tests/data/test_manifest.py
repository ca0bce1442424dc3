"""A manifest is read as it was written, and every mistake is reported with file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from longvideo.data.manifest import ShotEntry, VideoEntry, read_manifest, write_manifest
from longvideo.errors import UserError

SHOT = {"start": 0, "end": 29, "caption": "a small red circle drifts left"}
LINE: dict[str, Any] = {"video": "a.mp4", "fps": 24, "num_frames": 61, "shots": [SHOT]}


def manifest(folder: Path, *lines: str) -> Path:
    (folder / "a.mp4").write_bytes(b"")
    path = folder / "manifest.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_written_manifest_reads_back(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"")
    shots = (ShotEntry(0, 29, "one"), ShotEntry(40, 61, "two"))
    write_manifest(tmp_path / "manifest.jsonl", [VideoEntry(Path("videos/a.mp4"), 23.976, 61, shots)])
    (entry,) = read_manifest(tmp_path / "manifest.jsonl")
    assert entry == VideoEntry(tmp_path / "videos" / "a.mp4", 23.976, 61, shots)


def test_samples_are_written_where_there_are_any(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    shots = (ShotEntry(0, 61, "one"),)
    entries = [VideoEntry(Path("a.mp4"), 24.0, 61, shots, sample) for sample in ("walk", "walk", None)]
    write_manifest(tmp_path / "manifest.jsonl", entries)
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert ["sample" in line for line in lines] == [True, True, False]
    assert [entry.sample for entry in read_manifest(tmp_path / "manifest.jsonl")] == ["walk", "walk", None]


def test_captions_may_hold_line_ends_of_other_languages(tmp_path: Path) -> None:
    text = json.dumps(LINE | {"shots": [SHOT | {"caption": "one\u2028two"}]}, ensure_ascii=False)
    (entry,) = read_manifest(manifest(tmp_path, text))
    assert entry.shots[0].caption == "one\u2028two"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "the line is not JSON: Expecting property name enclosed in double quotes in column 2"),
        ("[1]", r"got \[1\], expected an object with the keys video, fps, num_frames, shots"),
        (json.dumps(LINE | {"frames": 3}), "unknown key 'frames'; did you mean 'num_frames'"),
        (json.dumps({"video": "a.mp4"}), "missing shots; add it"),
        (json.dumps(LINE | {"video": 3}), "video is 3, expected a file name"),
        (json.dumps(LINE | {"video": "b.mp4"}), "there is no video .*b.mp4"),
        (json.dumps(LINE | {"fps": "24"}), 'fps is "24", expected a number above 0'),
        (json.dumps(LINE | {"fps": True}), "fps is true"),
        (json.dumps(LINE | {"fps": float("nan")}), "fps is NaN"),
        (json.dumps(LINE | {"num_frames": 61.5}), "num_frames is 61.5, expected a whole number"),
        (json.dumps(LINE | {"shots": []}), r"shots is \[\], expected a list of at least one shot"),
        (json.dumps(LINE | {"shots": [SHOT | {"caption": " "}]}), r"shots\[0\]: caption is"),
        (json.dumps(LINE | {"shots": [SHOT | {"end": 62}]}), r"shots\[0\]: end is 62, expected .* 1\.\.61"),
        (json.dumps(LINE | {"shots": [SHOT, SHOT]}), r"shots\[1\]: start is 0, expected a whole number of at least 29"),
        (
            json.dumps(LINE | {"shots": [SHOT | {"caption": "a \ud83d"}]}),
            r"shots\[0\]: caption is not valid text: half a",
        ),
        (json.dumps(LINE | {"video": "\ud83d.mp4"}), "video is not valid text"),
        (json.dumps(LINE).replace("24", "9" * 5000), "is not JSON: it is nested too deep, or has too long a number"),
        ("[" * 100_000, "is not JSON: it is nested too deep, or has too long a number"),
        (json.dumps(LINE | {"sample": ""}), 'sample is "", expected a name'),
        (json.dumps(LINE | {"shots": [SHOT | {"text": ""}]}), r"shots\[0\]: unknown key 'text'"),
    ],
)
def test_mistakes_name_file_line_and_remedy(tmp_path: Path, line: str, message: str) -> None:
    path = manifest(tmp_path, json.dumps(LINE), "", line)
    with pytest.raises(UserError, match=rf"manifest\.jsonl:3: (.*: )?.*{message}|manifest\.jsonl:3: {message}"):
        read_manifest(path)


def test_a_byte_order_mark_is_no_part_of_a_manifest(tmp_path: Path) -> None:
    path = manifest(tmp_path, json.dumps(LINE))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_manifest(path)) == 1


def test_missing_empty_and_binary_manifests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no manifest"):
        read_manifest(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        read_manifest(tmp_path)
    with pytest.raises(UserError, match="lists no video"):
        read_manifest(manifest(tmp_path, "", ""))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="binary.jsonl:1 is not UTF-8 text"):
        read_manifest(tmp_path / "binary.jsonl")
