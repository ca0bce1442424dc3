"""Locks on files and folders that are written, which end with the process."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from longvideo.errors import UserError
from longvideo.files.names import LOCK_SUFFIX, neighbor, temporary_names
from longvideo.files.writing import disk_errors, remove

if TYPE_CHECKING:
    from collections.abc import Generator


class BusyError(UserError):
    """Another process holds a lock."""


@contextmanager
def locked_target(path: Path) -> Generator[None]:
    """Hold the lock of a file or folder to write, and remove the temporary files of killed processes.

    The parent folder is created. Raises BusyError if another process writes the target.
    """
    target = Path(os.path.realpath(path))
    file = neighbor(target, LOCK_SUFFIX)
    with disk_errors(path, file):
        target.parent.mkdir(parents=True, exist_ok=True)
    with locked(file, busy=f"{path} is being written by another process; wait for it, or choose another name"):
        for abandoned in temporary_names(target):
            remove(abandoned)
        yield


@contextmanager
def locked(file: Path, *, busy: str) -> Generator[None]:
    """Hold a lock until the block or the process ends, for any reason.

    file: the lock file, in an existing folder; it is removed afterwards. busy: message of the BusyError that is raised
    if another process holds the lock.
    """
    descriptor = _take_lock(file, busy)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


def _take_lock(file: Path, busy: str) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        except FileNotFoundError:
            pass  # its last holder has just removed it
        except BlockingIOError as error:
            os.close(descriptor)
            raise BusyError(busy) from error
        os.close(descriptor)
