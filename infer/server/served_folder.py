"""The folder of a server. One process at a time uses it, and only its user can read it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from longvideo.errors import UserError
from longvideo.files import locked, reason
from longvideo.permissions import make_private, private_umask

STREAMS, VIDEOS, PICTURES, FOOTAGE, REFERENCES = "streams", "videos", "pictures", "footage", "references"
DATABASE, LOCK = "jobs.sqlite", "lock"
FOLDERS = (STREAMS, VIDEOS, PICTURES, FOOTAGE, REFERENCES)
OWN_NAMES = frozenset({*FOLDERS, DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm", f"{DATABASE}-journal", LOCK})


@contextmanager
def served_folder(folder: Path) -> Iterator[None]:
    """Create a folder if it is missing and lock it; files that the process writes in the block are private to its user.

    Files of the server that exist already become private as well; other files in the folder are not changed. Raises
    BusyError where another process has the lock, before anything is changed, and UserError where the folder cannot be
    used.
    """
    with private_umask(), ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            busy = f"another process serves {folder}; stop it, or use another folder with --folder"
            stack.enter_context(locked(folder / LOCK, busy=busy))
            _make_private(folder)
        except OSError as error:
            raise UserError(f"cannot use the folder {folder}: {reason(error)}") from error
        yield


def for_clients(error: UserError, folder: Path) -> str:
    """Return the message of an error with the names of files in the server's folder, whose path clients do not see."""
    return str(error).replace(f"{folder}{os.sep}", "")


def _make_private(folder: Path) -> None:
    for name in FOLDERS:
        (folder / name).mkdir(exist_ok=True)
    entries = sorted(folder.iterdir())
    if all(entry.name in OWN_NAMES for entry in entries):
        make_private(folder)
    own = [entry for entry in entries if entry.name in OWN_NAMES]
    for entry in (*own, *(file for name in FOLDERS for file in (folder / name).iterdir())):
        if not entry.is_symlink():
            make_private(entry)
