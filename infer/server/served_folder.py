"""The folder of a server. One process at a time uses it, and only its user can read it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from longvideo.errors import UserError
from longvideo.files import locked, reason

STREAMS, VIDEOS, DATABASE, LOCK = "streams", "videos", "jobs.sqlite", "lock"
OWN_NAMES = frozenset({STREAMS, VIDEOS, DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm", f"{DATABASE}-journal", LOCK})
PRIVATE_FOLDER, PRIVATE_FILE = 0o700, 0o600
PRIVATE_UMASK = 0o077


@contextmanager
def served_folder(folder: Path) -> Iterator[None]:
    """Create a folder if it is missing and lock it; files that the process writes in the block are private to its user.

    Files of the server that exist already become private as well; other files in the folder are not changed. Raises
    BusyError where another process has the lock, before anything is changed, and UserError where the folder cannot be
    used.
    """
    previous_mask = os.umask(PRIVATE_UMASK)
    try:
        with ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                busy = f"another process serves {folder}; stop it, or use another folder with --folder"
                stack.enter_context(locked(folder / LOCK, busy=busy))
                _make_private(folder)
            except OSError as error:
                raise UserError(f"cannot use the folder {folder}: {reason(error)}") from error
            yield
    finally:
        os.umask(previous_mask)


def _make_private(folder: Path) -> None:
    for name in (STREAMS, VIDEOS):
        (folder / name).mkdir(exist_ok=True)
    entries = sorted(folder.iterdir())
    if all(entry.name in OWN_NAMES for entry in entries):
        folder.chmod(PRIVATE_FOLDER)
    own = [entry for entry in entries if entry.name in OWN_NAMES]
    for entry in (*own, *(folder / STREAMS).iterdir(), *(folder / VIDEOS).iterdir()):
        if not entry.is_symlink():
            entry.chmod(PRIVATE_FOLDER if entry.is_dir() else PRIVATE_FILE)
