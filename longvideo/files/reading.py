"""Bounded reading of text and JSON, and the reasons of errors in a few words."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from longvideo.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from pathlib import Path

MAX_TEXT_BYTES = 64 * 2**20


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object. Raises CheckpointError, naming the file and the line, for anything else."""
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        value = parse_json(read_text(path, what="JSON file"), where=str(path))
    except UserError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} contains a {type(value).__name__}; expected a JSON object")
    return value


def read_text(path: Path, *, what: str, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Read UTF-8 text, with or without a byte order mark.

    what: kind of the file, for errors. Raises UserError if it cannot be read, has more than max_bytes, or is not UTF-8,
    with the line.
    """
    try:
        with path.open("rb") as file:  # not Path.read_bytes: a device or a pipe may never end
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {reason(error)}") from error
    if len(data) > max_bytes:
        raise UserError(f"the {what} {path} has more than {max_bytes:,} bytes; use a smaller file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line} is not UTF-8 text (byte 0x{data[error.start]:02x}); save the {what} as UTF-8"
        ) from error


def check_file(path: Path, what: str) -> None:
    """Raise UserError unless a path is an existing file. what: kind of the file, for errors."""
    try:
        is_file = path.is_file()
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {reason(error)}") from error
    if not is_file:
        raise UserError(f"there is no {what} {path}")


def read_lines(path: Path, *, what: str, max_bytes: int = MAX_TEXT_BYTES) -> list[str]:
    """Read UTF-8 text as lines, split only at line feeds, because captions may contain other line separators.

    Raises UserError as `read_text` does.
    """
    return [line.removesuffix("\r") for line in read_text(path, what=what, max_bytes=max_bytes).split("\n")]


def parse_json(text: str, *, where: str) -> Any:
    """Parse JSON. Raises UserError for text that is not JSON or is nested too deep. where: start of its message."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}" if "\n" in text.strip() else f"column {error.colno}"
        raise UserError(f"{where} is not JSON: {error.msg} in {place}") from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{where} is not JSON: it is nested too deep, or has too long a number") from error


def check_text(text: str, what: str) -> None:
    """Raise UserError for text with half of a surrogate pair, which files, tokenizers and browsers cannot process.

    what: name of the text in the error, with its line if it has one.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        place = text[max(0, error.start - 20) : error.start]
        code = ord(text[error.start])
        # Python maps a byte of a command line that is not UTF-8 to U+DC80..U+DCFF
        part = f"the byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"half a character (U+{code:04X})"
        raise UserError(
            f"{what} is not valid text: {part} follows {place!r}; use complete characters in UTF-8"
        ) from error


def reason(error: Exception) -> str:
    """Return in a few words the reason of an error of the operating system or of safetensors."""
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    text = str(error)
    return text.rsplit(": ", 1)[-1].split(" (os error", 1)[0].lower()
