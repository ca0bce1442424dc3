"""The manifest of a video data set: JSON lines, one video a line, the format in which people bring their own.

    {"video": "videos/000000.mp4", "fps": 24, "num_frames": 93,
     "shots": [{"start": 0, "end": 29, "caption": "a small red circle drifts left"}, ...]}

`video` is relative to the manifest's folder; `start` and `end` are frames of the video, end excluded. Shots are in
order and do not overlap; frames outside every shot are not used.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from longvideo.errors import UserError


@dataclass(frozen=True)
class ShotEntry:
    """Frames [start, end) of a video and what they show."""

    start: int
    end: int
    caption: str


@dataclass(frozen=True)
class VideoEntry:
    """One video; `video` is relative to the manifest's folder in the file and a full path once read."""

    video: Path
    fps: float
    num_frames: int
    shots: tuple[ShotEntry, ...]


def read_manifest(path: Path) -> list[VideoEntry]:
    """Read and check every line. Raises UserError naming file and line; blank lines are allowed."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"no manifest at {path}; write one with `longvideo data shapeworld` or by hand") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder; give the manifest file, such as {path / 'manifest.jsonl'}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8 (byte {error.start}); a manifest is JSON lines") from error
    entries = [_read_line(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not entries:
        raise UserError(f"{path} names no video; a manifest has one JSON object a line")
    return entries


def write_manifest(path: Path, entries: Iterable[VideoEntry]) -> None:
    """Write a manifest whole or not at all: under a temporary name first."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for entry in entries:
            file.write(json.dumps(asdict(entry) | {"video": entry.video.as_posix()}) + "\n")
    os.replace(partial, path)


def _read_line(line: str, path: Path, number: int) -> VideoEntry:
    where = f"{path}:{number}"
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    _check_keys(data, VideoEntry, where)
    video, fps, num_frames, shots = data["video"], data["fps"], data["num_frames"], data["shots"]
    _check(isinstance(video, str) and video != "", where, "video", video, "a file name")
    _check(_is_number(fps) and 0 < fps <= 1000, where, "fps", fps, "a number above 0")
    _check(_is_count(num_frames) and num_frames > 0, where, "num_frames", num_frames, "a whole number above 0")
    _check(isinstance(shots, list) and len(shots) > 0, where, "shots", shots, "a list of at least one shot")
    entries: list[ShotEntry] = []
    for i, shot in enumerate(shots):
        entries.append(_read_shot(shot, f"{where}: shots[{i}]", entries[-1].end if entries else 0, num_frames))
    file = path.parent / video
    if not file.is_file():
        raise UserError(f"{where}: no video at {file}; `video` is relative to the manifest's folder")
    return VideoEntry(file, float(fps), num_frames, tuple(entries))


def _read_shot(shot: Any, where: str, earliest: int, num_frames: int) -> ShotEntry:
    _check_keys(shot, ShotEntry, where)
    start, end, caption = shot["start"], shot["end"], shot["caption"]
    _check(_is_count(start) and start >= earliest, where, "start", start, f"a whole number of at least {earliest}")
    _check(
        _is_count(end) and start < end <= num_frames, where, "end", end, f"a whole number in {start + 1}..{num_frames}"
    )
    _check(isinstance(caption, str) and caption.strip() != "", where, "caption", caption, "a text that is not empty")
    return ShotEntry(start, end, caption)


def _check_keys(data: Any, schema: type, where: str) -> None:
    names = [field.name for field in fields(schema)]
    if not isinstance(data, dict):
        raise UserError(f"{where}: got {_show(data)}, wanted an object with the keys {', '.join(names)}")
    for key in data:
        if key not in names:
            nearest = difflib.get_close_matches(key, names, 1, 0.5)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known keys are {', '.join(names)}"
            raise UserError(f"{where}: unknown key {key!r}{hint}")
    missing = [name for name in names if name not in data]
    if missing:
        raise UserError(f"{where}: missing {', '.join(missing)}; add {'it' if len(missing) == 1 else 'them'}")


def _check(holds: bool, where: str, name: str, value: Any, wanted: str) -> None:
    if not holds:
        raise UserError(f"{where}: {name} is {_show(value)}, wanted {wanted}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
