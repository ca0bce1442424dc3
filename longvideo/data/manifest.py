"""The manifest of a video data set: JSON lines, one for each video.

    {"video": "videos/000000.mp4", "fps": 24, "num_frames": 93,
     "shots": [{"start": 0, "end": 29, "caption": "a small red circle drifts left"}, ...]}

`video` is relative to the manifest's folder; `start` and `end` are frames of the video, end excluded, or
`start_seconds` and `end_seconds` are times after its first picture. Shots are in order and do not overlap; frames
outside of shots are not used. `fps` and `num_frames` may be left out. Consecutive lines with the same `sample` are the
files of one longer video, in order. A JSON array and a table of shots are read too; see `longvideo.data.records`.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longvideo.data.records import Record, read_records
from longvideo.errors import UserError
from longvideo.files import check_text, write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

MAX_FPS = 1000
MAX_SECONDS = 10**6


@dataclass(frozen=True)
class ShotEntry:
    """A shot: the frames [start, end) of a video, numbered as they are shown, and their caption."""

    start: int
    end: int
    caption: str


@dataclass(frozen=True)
class TimedShotEntry:
    """A shot in seconds after the first picture of the video. end_seconds: None for the end of the video."""

    caption: str
    start_seconds: float = 0.0
    end_seconds: float | None = None


@dataclass(frozen=True)
class VideoEntry:
    """One video.

    video: path, relative to the manifest's folder in the file and complete after reading. fps: frames per second.
    num_frames: number of frames; both are compared with the file, and None is not compared. shots: all in frames, or
    all in seconds. sample: name of a longer video of which this is one file; consecutive entries with the same name
    form that video, with a cut between them. None for a video of one file.
    """

    video: Path
    fps: float | None
    num_frames: int | None
    shots: tuple[ShotEntry, ...] | tuple[TimedShotEntry, ...]
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
    for record in read_records(path):
        line = _read_record(record, path.parent)
        sample = line.sample
        if sample is not None:
            if sample != previous and sample in last_line:
                why = (
                    f"sample {_show(sample)} continues after other lines, its last one was line {last_line[sample]};"
                    " put its lines together, in the order of its shots"
                )
                line = replace(line, entry=None, problems=(*line.problems, why))
            last_line[sample] = record.line
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
        values: dict[str, Any] = asdict(entry) | {"video": entry.video.as_posix()}
        values["shots"] = [_given(shot) for shot in values["shots"]]
        lines.append(json.dumps(_given(values)) + "\n")
    write_text(path, "".join(lines))


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _read_record(record: Record, folder: Path) -> ManifestLine:
    if record.problem is not None:
        return ManifestLine(record.line, None, (record.problem,))
    values = _Values(record.data, VideoEntry, optional=("fps", "num_frames"))
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
    if video is not None and not problems:
        entry = VideoEntry(video, float(fps) if fps is not None else None, num_frames, entries, sample)
    return ManifestLine(record.line, entry, tuple(problems), video, fps, num_frames, sample)


def _read_shots(
    shots: Sequence[Any], num_frames: int | None
) -> tuple[tuple[ShotEntry, ...] | tuple[TimedShotEntry, ...], list[str]]:
    """Return the valid shots and the problems of the others. num_frames: of the video; None if unknown."""
    in_frames = [isinstance(shot, dict) and not {"start", "end"}.isdisjoint(shot) for shot in shots]
    in_seconds = [isinstance(shot, dict) and not {"start_seconds", "end_seconds"}.isdisjoint(shot) for shot in shots]
    if any(in_frames) and any(in_seconds):
        return (), ["shots have both frames and seconds; use start and end, or start_seconds and end_seconds, in all"]
    if all(isinstance(shot, dict) for shot in shots) and not any(in_frames):
        return _read_timed_shots(shots)
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
        caption = _take_caption(values)
        if start is not None and end is not None and caption is not None:
            entries.append(ShotEntry(start, end, caption))
        problems += [f"shots[{i}]: {problem}" for problem in values.problems]
    return tuple(entries), problems


def _read_timed_shots(shots: Sequence[Any]) -> tuple[tuple[TimedShotEntry, ...], list[str]]:
    """Return the valid shots in seconds and the problems of the others."""
    entries: list[TimedShotEntry] = []
    problems: list[str] = []
    earliest = 0.0
    for i, shot in enumerate(shots):
        values = _Values(shot, TimedShotEntry)
        start = values.take(
            "start_seconds",
            lambda value, least=earliest: _is_number(value) and least <= value <= MAX_SECONDS,
            f"a number of at least {earliest:g}",
        )
        if start is None:
            start = earliest
        is_last = i + 1 == len(shots)
        end = values.take(
            "end_seconds",
            lambda value, start=start, is_last=is_last: (
                is_last if value is None else _is_number(value) and start < value <= MAX_SECONDS
            ),
            f"a number above {start:g}",
        )
        if end is None and not is_last:
            values.problems.append("missing end_seconds; only the last shot may last to the end of the video")
        caption = _take_caption(values)
        if caption is not None and not values.problems:
            entries.append(TimedShotEntry(caption, float(start), None if end is None else float(end)))
        earliest = end or earliest
        problems += [f"shots[{i}]: {problem}" for problem in values.problems]
    return tuple(entries), problems


def _take_caption(values: _Values) -> str | None:
    return values.take(
        "caption", lambda value: isinstance(value, str) and value.strip() != "", "a text that is not empty"
    )


class _Values:
    """The values of a JSON object with the fields of a dataclass, and the problems with them.

    Whole numbers may be written as 13.0. optional: keys that may be left out, next to the fields with a default.
    """

    def __init__(self, data: Any, schema: type, *, optional: Sequence[str] = ()) -> None:
        self.data = {key: _whole(value) for key, value in data.items()} if isinstance(data, dict) else {}
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
        required = [field.name for field in fields(schema) if field.default is MISSING and field.name not in optional]
        missing = [name for name in required if name not in data]
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


def _whole(value: Any) -> Any:
    """Return 13 for 13.0, as spreadsheets and tables of statistics write whole numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _least(number: int) -> str:
    return f"a whole number of at least {number}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
