"""Read the answers of single videos from the results.json of `longvideo eval shapeworld`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from longvideo.errors import UserError
from longvideo.evaluation.shapeworld import QUESTIONS
from longvideo.files import parse_json, read_text

FILE_NAME = "results.json"
MAX_BYTES = 512 * 2**20

KINDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a whole number",
    bool: "true or false",
    type(None): "null",
}
"""Names of JSON's types in errors."""

Answers = Mapping[str, bool | None]
"""Whether the answer to each question is right; None for a question that does not apply."""

T = TypeVar("T")


@dataclass(frozen=True)
class JudgedShot:
    """One shot of a results.json.

    scene: JSON object of the expected scene. expected_frame: frame at which the shot should begin. answers: to
    QUESTIONS, and to "shows_prompt" and "cut_in_time", as in `ShotResult`.
    """

    prompt: str
    scene: dict[str, Any]
    expected_frame: int
    answers: Answers


@dataclass(frozen=True)
class JudgedVideo:
    """One video of a results.json.

    windows: answers in consecutive windows of OPENING_SECONDS; empty for a video of several shots, and for one of less
    than half a window.
    """

    seed: int
    num_frames: int
    shots: tuple[JudgedShot, ...]
    windows: tuple[Answers, ...]


@dataclass(frozen=True)
class ResultsFile:
    """The contents of a results.json: at least one video, in the order of the file."""

    path: Path
    videos: tuple[JudgedVideo, ...]


def read_results(path: Path) -> ResultsFile:
    """Read a results.json, or that of a folder. Raises UserError for a file of another kind."""
    file = path / FILE_NAME if path.is_dir() else path
    text = read_text(file, what=f"{FILE_NAME} of eval shapeworld", max_bytes=MAX_BYTES)
    content = parse_json(text, where=str(file))
    try:
        videos = _take_list(content, "videos", "the file")
        return ResultsFile(file, tuple(_read_video(video, f"videos[{i}]") for i, video in enumerate(videos)))
    except _FieldError as error:
        raise UserError(
            f"{file} is not a result of longvideo eval shapeworld: {error}; use a folder that this command wrote"
        ) from error


class _FieldError(Exception):
    """A field is missing, empty or of another type."""


def _read_video(record: Any, where: str) -> JudgedVideo:
    shots, windows = _take_list(record, "shots", where), _take(record, "by_opening", list, where)
    return JudgedVideo(
        seed=_take(record, "seed", int, where),
        num_frames=_take(record, "num_frames", int, where),
        shots=tuple(_read_shot(shot, f"{where}.shots[{i}]") for i, shot in enumerate(shots)),
        windows=tuple(_read_verdict(window, f"{where}.by_opening[{i}]") for i, window in enumerate(windows)),
    )


def _read_shot(record: Any, where: str) -> JudgedShot:
    answers = _read_verdict(_take(record, "verdict", dict, where), f"{where}.verdict")
    # the name in older files
    start = _take(record, "asked_frame" if "asked_frame" in record else "expected_frame", int, where)
    answers["shows_prompt"] = bool(answers["color"] and answers["shape"])
    answers["cut_in_time"] = record.get("cut_frame") is not None if start else None
    return JudgedShot(_take(record, "prompt", str, where), _take(record, "scene", dict, where), start, answers)


def _read_verdict(record: Any, where: str) -> dict[str, bool | None]:
    """Return the answers of a verdict, of which only "both" may be null."""
    has_one_object = isinstance(record, dict) and record.get("both", False) is None
    return {name: None if name == "both" and has_one_object else _take(record, name, bool, where) for name in QUESTIONS}


def _take_list(record: Any, name: str, where: str) -> list[Any]:
    """Return a list of at least one element from a JSON object."""
    values = _take(record, name, list, where)
    if not values:
        raise _FieldError(f"{name} of {where} is empty")
    return values


def _take(record: Any, name: str, kind: type[T], where: str) -> T:
    """Return a field of a JSON object. kind: its type. where: name of the object in the error."""
    if not isinstance(record, dict) or name not in record:
        raise _FieldError(f"{where} has no {name}")
    value = record[name]
    # not isinstance: a bool is an int in Python
    if type(value) is not kind:
        actual = KINDS.get(type(value), "a number with decimals")
        raise _FieldError(f"{name} of {where} is {actual}, expected {KINDS[kind]}")
    return value
