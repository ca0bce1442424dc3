"""Names of temporary files and locks, next to the files and folders that they belong to."""

from __future__ import annotations

import os
import re
import uuid
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

TEMPORARY_SUFFIX, LOCK_SUFFIX = ".part", ".lock"
UNIQUE_DIGITS = 8
MAX_NAME_BYTES = 255  # limit of Linux's file systems


def temporary_name(path: Path) -> Path:
    """Return an unused hidden name next to a path, short enough for any file system."""
    return path.with_name(f"{_temporary_stem(path)}.{uuid.uuid4().hex[:UNIQUE_DIGITS]}{TEMPORARY_SUFFIX}")


def temporary_names(path: Path) -> list[Path]:
    """Return the existing temporary files of a path, of running processes and of killed ones."""
    name = re.compile(re.escape(f"{_temporary_stem(path)}.") + f"[0-9a-f]{{{UNIQUE_DIGITS}}}{TEMPORARY_SUFFIX}")
    return [other for other in path.parent.iterdir() if name.fullmatch(other.name)]


def neighbor(path: Path, suffix: str) -> Path:
    """Return the hidden name next to a path, with a suffix."""
    return path.with_name(f"{_temporary_stem(path)}{suffix}")


def _temporary_stem(path: Path) -> str:
    limit = MAX_NAME_BYTES - UNIQUE_DIGITS - len(TEMPORARY_SUFFIX) - 2  # for two dots
    return "." + os.fsencode(path.name)[:limit].decode("utf-8", "ignore")
