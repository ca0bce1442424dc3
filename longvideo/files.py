"""Atomic writing of files and folders, locks, and bounded reading of text.

Everything that this project writes goes through `write_file` or `write_folder`: they write under a temporary name next
to the target, flush to the disk, and rename. An error becomes one line with the path, and no temporary files remain.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
import shutil
import stat
import tempfile
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from longvideo.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

TEMPORARY_SUFFIX, LOCK_SUFFIX = ".part", ".lock"
PLAN_FILE = "plan.json"
"""File of an unfinished folder with a description of its contents; a later run with the same plan continues it."""
UNIQUE_DIGITS = 8
MAX_NAME_BYTES = 255  # limit of Linux's file systems
MAX_TEXT_BYTES = 64 * 2**20
RENAME_EXCHANGE = 2  # renameat2(2)
AT_FDCWD = -100  # openat(2)


class WriteError(UserError):
    """A file or folder cannot be written. An older file or folder is unchanged."""


class BusyError(UserError):
    """Another process holds a lock."""


def write_file(path: Path, write: Callable[[Path], None], *, mode: int | None = None) -> None:
    """Write a file atomically.

    write: writes the content to the temporary path that it gets. mode: permission bits; by default those of the file
    that is replaced, or of a new file. If `path` is a link, its target is written. Raises WriteError with the path and
    the reason for errors of the disk; an older file is then unchanged.
    """
    target = Path(os.path.realpath(path))
    temporary = temporary_name(target)
    with _as_write_error(path, temporary):
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
    write_bytes(path, text.encode("utf-8"), mode=mode)


def write_bytes(path: Path, data: bytes, *, mode: int | None = None) -> None:
    """Write bytes. Raises WriteError as `write_file` does."""
    write_file(path, lambda target: _write_bytes(target, data), mode=mode)


def copy_file(source: Path, path: Path) -> None:
    """Copy the contents of a file. Raises WriteError as `write_file` does."""
    write_file(path, lambda target: _copy_bytes(source, target))


def append_line(path: Path, line: str) -> None:
    """Append a line of UTF-8 text to a file. Raises WriteError for errors of the disk; the file is then unchanged."""
    length = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab", buffering=0) as stream:
            data = memoryview(f"{line}\n".encode())
            while data:
                data = data[stream.write(data) :]
    except OSError as error:
        with suppress(OSError):
            os.truncate(path, length)
        raise WriteError(f"cannot write {path}: {reason(error)}; {_remaining(path)}") from error


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
    temporary = temporary_name(target) if plan is None else _neighbor(target, TEMPORARY_SUFFIX)
    with _as_write_error(path, temporary):
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
        with _as_write_error(self._path, self.file), self.file.open("ab", buffering=0) as stream:
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
    with _as_write_error(path, file), file.open("xb"):
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
        _remove(new)
    else:
        old = temporary_name(path)
        path.rename(old)
        new.rename(path)
        _remove(old)
    flush(path.parent)


def temporary_name(path: Path) -> Path:
    """Return an unused hidden name next to a path, short enough for any file system."""
    return path.with_name(f"{_temporary_stem(path)}.{uuid.uuid4().hex[:UNIQUE_DIGITS]}{TEMPORARY_SUFFIX}")


def temporary_names(path: Path) -> list[Path]:
    """Return the existing temporary files of a path, of running processes and of killed ones."""
    name = re.compile(re.escape(f"{_temporary_stem(path)}.") + f"[0-9a-f]{{{UNIQUE_DIGITS}}}{TEMPORARY_SUFFIX}")
    return [other for other in path.parent.iterdir() if name.fullmatch(other.name)]


def flush(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked_target(path: Path) -> Generator[None]:
    """Hold the lock of a file or folder to write, and remove the temporary files of killed processes.

    The parent folder is created. Raises BusyError if another process writes the target.
    """
    target = Path(os.path.realpath(path))
    file = _neighbor(target, LOCK_SUFFIX)
    with _as_write_error(path, file):
        target.parent.mkdir(parents=True, exist_ok=True)
    with locked(file, busy=f"{path} is being written by another process; wait for it, or choose another name"):
        for abandoned in temporary_names(target):
            _remove(abandoned)
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


@contextmanager
def _as_write_error(path: Path, temporary: Path) -> Generator[None]:
    """Turn errors of the disk into WriteError with the path; errors of other files than `temporary` pass."""
    try:
        yield
    except WriteError as error:
        if isinstance(error.__cause__, OSError | SafetensorError) and not str(error).startswith(
            f"cannot write {path}: "
        ):
            raise WriteError(f"cannot write {path}: {reason(error.__cause__)}; {_remaining(path)}") from error
        raise
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and _is_elsewhere(error, temporary):
            raise  # a source file cannot be read
        raise WriteError(f"cannot write {path}: {reason(error)}; {_remaining(path)}") from error


def _is_elsewhere(error: OSError, temporary: Path) -> bool:
    if error.filename is None or isinstance(error.filename, int):
        return False
    named = Path(os.fsdecode(error.filename))
    return named != temporary and named not in temporary.parents and temporary not in named.parents


def _remaining(path: Path) -> str:
    with suppress(OSError):
        if path.exists():
            return "the older one is unchanged"
    return "no part of it remains"


def _begin_folder(folder: Path, plan: object) -> None:
    """Create or clear a temporary folder; one with the same plan keeps its finished files."""
    text = json.dumps(plan, sort_keys=True)
    if os.path.lexists(folder) and (plan is None or not _was_begun(folder, text)):
        _remove(folder)
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


def _neighbor(path: Path, suffix: str) -> Path:
    """Return the hidden name next to a path, with a suffix."""
    return path.with_name(f"{_temporary_stem(path)}{suffix}")


def _temporary_stem(path: Path) -> str:
    limit = MAX_NAME_BYTES - UNIQUE_DIGITS - len(TEMPORARY_SUFFIX) - 2  # for two dots
    return "." + os.fsencode(path.name)[:limit].decode("utf-8", "ignore")


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _copy_bytes(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


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


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names atomically; return whether the system and the file system support that."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    return renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
