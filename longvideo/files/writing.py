"""Atomic writing of files and folders.

Everything that this project writes goes through `write_file` or `write_folder`: they write under a temporary name next
to the target, flush to the disk, and rename. An error becomes one line with the path, and no temporary files remain.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import stat
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from longvideo.errors import UserError
from longvideo.files.names import MAX_NAME_BYTES, TEMPORARY_SUFFIX, neighbor, temporary_name
from longvideo.files.reading import reason

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

PLAN_FILE = "plan.json"
"""File of an unfinished folder with a description of its contents; a later run with the same plan continues it."""
RENAME_EXCHANGE = 2  # renameat2(2)
AT_FDCWD = -100  # openat(2)


class WriteError(UserError):
    """A file or folder cannot be written. An older file or folder is unchanged."""


def write_file(path: Path, write: Callable[[Path], object], *, mode: int | None = None) -> None:
    """Write a file atomically.

    write: writes the content to the temporary path that it gets. mode: permission bits; by default those of the file
    that is replaced, or of a new file. If `path` is a link, its target is written. Raises WriteError with the path and
    the reason for errors of the disk; an older file is then unchanged.
    """
    target = Path(os.path.realpath(path))
    temporary = temporary_name(target)
    with disk_errors(path, temporary):
        if target.exists() and not target.is_file():
            raise WriteError(f"cannot write {path}: it is a folder or a device; choose another name")
        try:
            with temporary.open("xb"):
                pass
            if mode is None:
                mode = stat.S_IMODE((target if target.exists() else temporary).stat().st_mode)
            write(temporary)
            temporary.chmod(mode)  # some writers create a file that only its owner can read
            flush(temporary)
            temporary.replace(target)
            flush(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, mode: int | None = None) -> None:
    """Write UTF-8 text. Raises WriteError as `write_file` does."""
    data = text.encode("utf-8")
    write_file(path, lambda target: target.write_bytes(data), mode=mode)


def write_bytes(path: Path, data: bytes, *, mode: int | None = None) -> None:
    """Write bytes. Raises WriteError as `write_file` does."""
    write_file(path, lambda target: target.write_bytes(data), mode=mode)


def copy_file(source: Path, path: Path) -> None:
    """Copy the contents of a file. Raises WriteError as `write_file` does."""
    write_file(path, lambda target: shutil.copyfile(source, target))


def append_line(path: Path, line: str) -> None:
    """Append a line of UTF-8 text to a file. Raises WriteError for errors of the disk; the file is then unchanged."""
    length = path.stat().st_size if path.exists() else 0
    with disk_errors(path, path):
        try:
            with path.open("ab", buffering=0) as stream:
                data = memoryview(f"{line}\n".encode())
                while data:
                    data = data[stream.write(data) :]
        except OSError:
            with suppress(OSError):
                os.truncate(path, length)
            raise


def write_json(path: Path, value: object, *, indent: int = 2) -> None:
    """Write a value as indented JSON. Raises WriteError as `write_file` does."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


@contextmanager
def write_folder(path: Path, *, overwrite: bool = False, plan: object = None) -> Generator[Path]:
    """Write a folder atomically: yield a temporary folder, which is flushed and renamed at the end of the block.

    overwrite: replace an existing folder. plan: description of the contents, for JSON. The temporary folder is empty,
    unless an earlier block with the same plan was interrupted by Ctrl-C or a kill: then it has the files that this
    block had finished. With a plan, the caller must hold the lock of the target, see `locked_target`.

    Raises WriteError if the folder exists and must not be replaced, and for errors of the disk. After an error in the
    block, its files are removed, and an older folder is unchanged.
    """
    if path.exists() and not overwrite:
        raise WriteError(f"{path} exists; choose another name or add --overwrite")
    target = Path(os.path.realpath(path))
    temporary = temporary_name(target) if plan is None else neighbor(target, TEMPORARY_SUFFIX)
    with disk_errors(path, temporary):
        finished = True
        try:
            _begin_folder(temporary, plan)
            yield temporary
            (temporary / PLAN_FILE).unlink(missing_ok=True)
            for entry in (*temporary.rglob("*"), temporary):
                flush(entry)
            replace_path(temporary, target)
        except (KeyboardInterrupt, SystemExit):
            finished = plan is None
            raise
        finally:
            if finished:
                shutil.rmtree(temporary, ignore_errors=True)


class Spool:
    """A temporary file that grows, with values of a file that is written later. file: its path."""

    def __init__(self, path: Path, file: Path) -> None:
        self._path, self.file = path, file

    def append(self, data: memoryview) -> int:
        """Append bytes and return their offset. Raises WriteError with the path of the later file."""
        with disk_errors(self._path, self.file), self.file.open("ab", buffering=0) as stream:
            offset, left = stream.seek(0, os.SEEK_END), data
            while left:
                left = left[stream.write(left) :]
        return offset


@contextmanager
def spooled(path: Path) -> Generator[Spool]:
    """Yield a temporary file next to a path, and remove it at the end of the block.

    The caller must hold the lock of the path, see `locked_target`, which removes the files of killed processes.
    """
    file = temporary_name(Path(os.path.realpath(path)))
    with disk_errors(path, file), file.open("xb"):
        pass
    try:
        yield Spool(path, file)
    finally:
        file.unlink(missing_ok=True)


def check_target(path: Path, *, overwrite: bool = True) -> None:
    """Raise WriteError for a target that `write_file` could not write, before the work; nothing on the disk changes.

    Refused are a name that is too long, a missing or read-only folder, a link to a missing file, a folder, a device, a
    pipe, and an existing file unless `overwrite`.
    """
    if len(os.fsencode(path.name)) > MAX_NAME_BYTES:
        raise WriteError(f"cannot write {path}: its name has more than {MAX_NAME_BYTES} bytes; choose a shorter name")
    folder = Path(os.path.realpath(path)).parent
    try:
        if not folder.is_dir():
            raise WriteError(f"cannot write {path}: {folder} is not a folder; create it first")
        if path.is_symlink() and not path.exists():
            raise WriteError(f"cannot write {path}: it is a link to {path.readlink()}, which is missing; remove it")
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "a device, a pipe or a socket"
            raise WriteError(f"cannot write {path}: it is {kind}; choose another name")
        if path.exists() and not overwrite:
            raise WriteError(f"{path} exists; choose another name or add --overwrite")
        with tempfile.TemporaryFile(dir=folder):
            pass
        if path.exists():
            with path.open("r+b"):
                pass
    except OSError as error:
        raise WriteError(f"cannot write {path}: {reason(error)}") from error


def replace_path(new: Path, path: Path) -> None:
    """Rename a file or folder to a name that may exist.

    On Linux the exchange is atomic: the name exists at every moment, even if the process is killed.
    """
    if not path.exists():
        new.rename(path)
    elif _exchange(new, path):
        remove(new)
    else:
        old = temporary_name(path)
        path.rename(old)
        new.rename(path)
        remove(old)
    flush(path.parent)


def flush(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path, temporary: Path) -> Generator[None]:
    """Turn errors of the disk into WriteError with the path; errors of other files than `temporary` pass."""
    try:
        yield
    except (WriteError, OSError, SafetensorError) as error:
        cause = error.__cause__ if isinstance(error, WriteError) else error
        names_path = isinstance(error, WriteError) and str(error).startswith(f"cannot write {path}: ")
        if names_path or not isinstance(cause, OSError | SafetensorError):
            raise
        if error is cause and isinstance(cause, OSError) and _is_elsewhere(cause, temporary):
            raise  # a source file cannot be read
        remains = "no part of it remains"
        with suppress(OSError):
            if path.exists():
                remains = "the older one is unchanged"
        raise WriteError(f"cannot write {path}: {reason(cause)}; {remains}") from error


def _is_elsewhere(error: OSError, temporary: Path) -> bool:
    if error.filename is None or isinstance(error.filename, int):
        return False
    named = Path(os.fsdecode(error.filename))
    return named != temporary and named not in temporary.parents and temporary not in named.parents


def _begin_folder(folder: Path, plan: object) -> None:
    """Create or clear a temporary folder; one with the same plan keeps its finished files."""
    text = json.dumps(plan, sort_keys=True)
    if os.path.lexists(folder) and (plan is None or not _was_begun(folder, text)):
        remove(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in [path for path in folder.rglob(f".*{TEMPORARY_SUFFIX}") if path.is_file()]:
        unfinished.unlink()
    if plan is not None:
        write_text(folder / PLAN_FILE, text)


def _was_begun(folder: Path, text: str) -> bool:
    file = folder / PLAN_FILE
    if folder.is_symlink() or file.is_symlink() or not file.is_file():
        return False
    return file.read_bytes() == text.encode()


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names atomically; return whether the system and the file system support that."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    return renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
