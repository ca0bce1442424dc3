"""Permissions of what this project writes into folders that it works in: only the user of the process can read it."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

PRIVATE_FOLDER, PRIVATE_FILE = 0o700, 0o600
PRIVATE_UMASK = 0o077


@contextmanager
def private_umask() -> Generator[None]:
    """Make the files and folders that the process creates in the block private to its user."""
    previous = os.umask(PRIVATE_UMASK)
    try:
        yield
    finally:
        os.umask(previous)


def make_private(path: Path) -> None:
    """Make an existing file or folder private to its user. The contents of a folder keep their permissions."""
    path.chmod(PRIVATE_FOLDER if path.is_dir() else PRIVATE_FILE)
