"""Files that appear whole or not at all, and JSON that is checked."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path

from longvideo.errors import CheckpointError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let write fill a temporary neighbour of path, then rename it; a failure leaves path as it was."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # some writers leave a file that only its owner can read
        write(temporary)
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write an object as indented JSON, atomically."""
    text = json.dumps(value, indent=2) + "\n"

    def write(target: Path) -> None:
        target.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object; raise CheckpointError naming the file and the line when it is none."""
    if not path.is_file():
        raise CheckpointError(f"no file {path}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON: {error.msg} in line {error.lineno}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not JSON: it is not UTF-8 text") from error
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"{path} is not JSON: it is nested too deep, or has too long a number") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; wanted a JSON object")
    return value
