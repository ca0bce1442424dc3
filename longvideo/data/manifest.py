"""The manifest of a video data set: JSON lines, one for each video.

    {"video": "videos/000000.mp4", "fps": 24, "num_frames": 93,
     "shots": [{"start": 0, "end": 29, "caption": "a small red circle drifts left"}, ...]}

`video` is relative to the manifest's folder; `start` and `end` are frames of the video, end excluded. Shots are in
order and do not overlap; frames outside of shots are not used. Consecutive lines with the same `sample` are the files
of one longer video, in order.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longvideo.errors import UserError
from longvideo.files import check_text, parse_json, read_lines, write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

MAX_FPS = 1000
MAX_BYTES = 512 * 2**20


@dataclass(frozen=True)
class ShotEntry:
    """A shot: the frames [start, end) of a video, and their caption."""

    start: int
    end: int
    caption: str


@dataclass(frozen=True)
class VideoEntry:
    """One video.

    video: path, relative to the manifest's folder in the file and complete after reading. fps: frames per second.
    sample: name of a longer video of which this is one file; consecutive entries with the same name form that video,
    with a cut between them. None for a video of one file.
    """

    video: Path
    fps: float
    num_frames: int
    shots: tuple[ShotEntry, ...]
    sample: str | None = None


@dataclass(frozen=True)
class ManifestLine:
    """A line of a manifest: its entry, or all of its problems.

    number: of the line, from 1. video, fps, num_frames, sample: the valid values, even if others are wrong; None
    otherwise.
    """

    number: int
    entry: VideoEntry | None
    problems: tuple[str, ...] = ()
    video: Path | None = None
    fps: float | None = None
    num_frames: int | None = None
    sample: str | None = None


def iterate_manifest(path: Path) -> Iterator[ManifestLine]:
    """Read and check a manifest line by line, with all problems of each line; blank lines are skipped.

    Raises UserError only if the file cannot be read or has no lines.
    """
    last_line: dict[str, int] = {}
    previous: str | None = None
    for number, text in enumerate(_read_lines(path), 1):
        if not text.strip():
            continue
        line = _read_line(text, path.parent, number)
        sample = line.sample
        if sample is not None:
            if sample != previous and sample in last_line:
                why = (
                    f"sample {_show(sample)} continues after other lines, its last one was line {last_line[sample]};"
                    " put its lines together, in the order of its shots"
                )
                line = replace(line, entry=None, problems=(*line.problems, why))
            last_line[sample] = number
        # a line without a valid sample or entry does not end the sample around it
        if sample is not None or line.entry is not None:
            previous = sample
        yield line


def read_manifest(path: Path) -> list[VideoEntry]:
    """Read and check every line; blank lines are allowed. Raises UserError with the file and the line."""
    entries: list[VideoEntry] = []
    for line in iterate_manifest(path):
        if line.entry is None:
            raise UserError(f"{path}:{line.number}: {line.problems[0]}")
        entries.append(line.entry)
    return entries


def write_manifest(path: Path, entries: Iterable[VideoEntry]) -> None:
    """Write a manifest, completely or not at all. Raises WriteError as `longvideo.files.write_file` does."""
    lines = []
    for entry in entries:
        values = asdict(entry) | {"video": entry.video.as_posix()}
        if entry.sample is None:
            del values["sample"]
        lines.append(json.dumps(values) + "\n")
    write_text(path, "".join(lines))


def _read_lines(path: Path) -> list[str]:
    if path.is_dir():
        raise UserError(f"{path} is a folder; use the manifest file, such as {path / 'manifest.jsonl'}")
    if not path.exists():
        raise UserError(f"there is no manifest {path}; write one, or use `longvideo data shapeworld`")
    lines = read_lines(path, what="manifest", max_bytes=MAX_BYTES)
    if not any(line.strip() for line in lines):
        raise UserError(f"{path} lists no video; expected one JSON object for each line")
    return lines


def _read_line(text: str, folder: Path, number: int) -> ManifestLine:
    try:
        data = parse_json(text, where="the line")
    except UserError as error:
        return ManifestLine(number, None, (str(error),))
    values = _Values(data, VideoEntry)
    name = values.take("video", lambda value: isinstance(value, str) and value != "", "a file name")
    fps = values.take("fps", lambda value: _is_number(value) and 0 < value <= MAX_FPS, "a number above 0")
    num_frames = values.take("num_frames", lambda value: _is_count(value) and value > 0, "a whole number above 0")
    sample = values.take("sample", lambda value: value is None or isinstance(value, str) and value != "", "a name")
    shots = values.take("shots", lambda value: isinstance(value, list) and value, "a list of at least one shot")
    entries, shot_problems = _read_shots(shots or [], num_frames)
    problems = [*values.problems, *shot_problems]
    video = folder / name if name is not None else None
    if video is not None and not video.is_file():
        problems.append(f"there is no video {video}; `video` is relative to the manifest's folder")
        video = None
    entry = None
    if video is not None and fps is not None and num_frames is not None and not problems:
        entry = VideoEntry(video, float(fps), num_frames, entries, sample)
    return ManifestLine(number, entry, tuple(problems), video, fps, num_frames, sample)


def _read_shots(shots: Sequence[Any], num_frames: int | None) -> tuple[tuple[ShotEntry, ...], list[str]]:
    """Return the valid shots and the problems of the others. num_frames: of the video; None if unknown."""
    entries: list[ShotEntry] = []
    problems: list[str] = []
    for i, shot in enumerate(shots):
        values = _Values(shot, ShotEntry)
        earliest = entries[-1].end if entries else 0
        start = values.take(
            "start", lambda value, least=earliest: _is_count(value) and value >= least, _least(earliest)
        )
        least = 1 if start is None else start + 1
        end = values.take(
            "end",
            lambda value, least=least: _is_count(value) and least <= value <= (num_frames or value),
            _least(least) if num_frames is None else f"a whole number in {least}..{num_frames}",
        )
        caption = values.take(
            "caption", lambda value: isinstance(value, str) and value.strip() != "", "a text that is not empty"
        )
        if start is not None and end is not None and caption is not None:
            entries.append(ShotEntry(start, end, caption))
        problems += [f"shots[{i}]: {problem}" for problem in values.problems]
    return tuple(entries), problems


class _Values:
    """The values of a JSON object with the fields of a dataclass, and the problems with them."""

    def __init__(self, data: Any, schema: type) -> None:
        self.data = data if isinstance(data, dict) else {}
        names = [field.name for field in fields(schema)]
        self.problems: list[str] = []
        if not isinstance(data, dict):
            self.problems.append(f"got {_show(data)}, expected an object with the keys {', '.join(names)}")
            return
        for key in data:
            if key not in names:
                nearest = difflib.get_close_matches(key, names, 1, 0.5)
                remedy = f"did you mean {nearest[0]!r}?" if nearest else f"expected {', '.join(names)}"
                self.problems.append(f"unknown key {key!r}; {remedy}")
        missing = [field.name for field in fields(schema) if field.default is MISSING and field.name not in data]
        if missing:
            self.problems.append(f"missing {', '.join(missing)}; add {'it' if len(missing) == 1 else 'them'}")

    def take(self, name: str, is_valid: Callable[[Any], Any], expected: str) -> Any:
        """Return a value, or None if it is missing or not valid. expected: description of a valid value."""
        value = self.data.get(name)
        if name in self.data and not is_valid(value):
            self.problems.append(f"{name} is {_show(value)}, expected {expected}")
            return None
        if isinstance(value, str):
            try:
                check_text(value, name)
            except UserError as error:
                self.problems.append(str(error))
                return None
        return value


def _least(number: int) -> str:
    return f"a whole number of at least {number}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
