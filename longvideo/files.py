"""Files and folders that appear whole or not at all, locks, and text that is read with bounds.

Everything that this project writes goes through `write_file` or `write_folder`: a temporary name beside the target, a
flush to the disk, a rename. What goes wrong becomes one line with the path, and nothing is left behind.
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
    from collections.abc import Callable, Iterator

TEMPORARY_SUFFIX, LOCK_SUFFIX = ".part", ".lock"
PLAN_FILE = "plan.json"
"""What a temporary folder is filled with, as long as it may be filled further after an interruption."""
UNIQUE_DIGITS = 8
MAX_NAME_BYTES = 255  # what Linux's file systems allow
MAX_TEXT_BYTES = 64 * 2**20
RENAME_EXCHANGE = 2  # renameat2(2)
AT_FDCWD = -100  # openat(2)


class WriteError(UserError):
    """A file or folder cannot be written; what was there before is as it was."""


class BusyError(UserError):
    """Another process holds a lock."""


def write_file(path: Path, write: Callable[[Path], None], *, mode: int | None = None) -> None:
    """Let `write` fill a temporary neighbor of a file, flush it to the disk, and rename it.

    A link is written through. mode: permission bits; by default those of the file that is replaced, or of a new file.
    Raises WriteError with the path and the reason where the disk refuses, with the older file, if any, as it was.
    """
    target = Path(os.path.realpath(path))
    temporary = temporary_name(target)
    with _refused_by_the_disk(path, temporary):
        if target.exists() and not target.is_file():
            raise WriteError(f"cannot write {path}: it is a folder or a device")
        try:
            with temporary.open("xb"):
                pass
            if mode is None:
                mode = stat.S_IMODE((target if target.exists() else temporary).stat().st_mode)
            write(temporary)
            temporary.chmod(mode)  # some writers leave a file that only its owner can read
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


def append_line(path: Path, line: str) -> None:
    """Add a line of UTF-8 text to a file. Raises WriteError where the disk refuses, with the file as it was."""
    length = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab", buffering=0) as stream:
            data = memoryview(f"{line}\n".encode())
            while data:
                data = data[stream.write(data) :]
    except OSError as error:
        with suppress(OSError):
            os.truncate(path, length)
        raise WriteError(f"cannot write {path}: {reason(error)}; {_what_is_there(path)}") from error


def write_json(path: Path, value: object, *, indent: int = 2) -> None:
    """Write a value as indented JSON. Raises WriteError as `write_file` does."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


@contextmanager
def write_folder(path: Path, *, overwrite: bool = False, plan: object = None) -> Iterator[Path]:
    """Yield a temporary neighbor of a folder; at the end of the block flush it and put it in its place.

    It is empty, unless the block was interrupted before (by Ctrl-C, or a kill) and `plan`, which says as JSON what is
    written, is the same: then the files that it had finished are still there. Whoever gives a plan holds the lock of
    the target, see `locked_target`.

    Raises WriteError where a folder is there that must not be replaced, and where the disk refuses. An error in the
    block removes what it wrote and leaves an older folder as it was.
    """
    if path.exists() and not overwrite:
        raise WriteError(f"{path} exists; choose another name, or ask to overwrite it")
    target = Path(os.path.realpath(path))
    temporary = temporary_name(target) if plan is None else _neighbor(target, TEMPORARY_SUFFIX)
    with _refused_by_the_disk(path, temporary):
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


def check_target(path: Path, *, overwrite: bool = True, remedy: str = "add --overwrite") -> None:
    """Raise WriteError where `write_file` would, as far as that can be told before; the disk is as it was afterwards.

    Refused: a name that is too long, a folder that is missing or cannot be written to, a link to nothing, a folder, a
    device, a pipe, and a file that is there unless `overwrite`. remedy: what allows to replace that.
    """
    if len(os.fsencode(path.name)) > MAX_NAME_BYTES:
        raise WriteError(f"cannot write {path}: its name has more than {MAX_NAME_BYTES} bytes; choose a shorter one")
    folder = Path(os.path.realpath(path)).parent
    try:
        if not folder.is_dir():
            raise WriteError(f"cannot write {path}: {folder} is not a folder; create it first")
        if path.is_symlink() and not path.exists():
            raise WriteError(f"cannot write {path}: it is a link to {path.readlink()}, which is not there; remove it")
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "a device, a pipe or a socket"
            raise WriteError(f"cannot write {path}: it is {kind}; choose another name")
        if path.exists() and not overwrite:
            raise WriteError(f"{path} exists; choose another name or {remedy}")
        with tempfile.TemporaryFile(dir=folder):
            pass
        if path.exists():
            with path.open("r+b"):
                pass
    except OSError as error:
        raise WriteError(f"cannot write {path}: {reason(error)}") from error


def replace_path(new: Path, path: Path) -> None:
    """Put a file or folder where another may be.

    On Linux one of the two has the name at every moment, even if the process is killed.
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
    """Return an unused hidden name beside a path, short enough for any file system."""
    return path.with_name(f"{_temporary_stem(path)}.{uuid.uuid4().hex[:UNIQUE_DIGITS]}{TEMPORARY_SUFFIX}")


def temporary_names(path: Path) -> list[Path]:
    """Return the names of `temporary_name` that are there for a path, of processes that run or were killed."""
    name = re.compile(re.escape(f"{_temporary_stem(path)}.") + f"[0-9a-f]{{{UNIQUE_DIGITS}}}{TEMPORARY_SUFFIX}")
    return [other for other in path.parent.iterdir() if name.fullmatch(other.name)]


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked_target(path: Path) -> Iterator[None]:
    """Hold the lock of a file or folder that is to be written, and remove what killed processes left beside it.

    Makes the folder that it will lie in. Raises BusyError where another process writes it.
    """
    target = Path(os.path.realpath(path))
    file = _neighbor(target, LOCK_SUFFIX)
    with _refused_by_the_disk(path, file):
        target.parent.mkdir(parents=True, exist_ok=True)
    with locked(file, busy=f"{path} is being written by another process; wait for it, or choose another name"):
        for abandoned in temporary_names(target):
            _remove(abandoned)
        yield


@contextmanager
def locked(file: Path, *, busy: str) -> Iterator[None]:
    """Hold a lock for this process, until the block or the process ends, however it ends.

    file: the lock itself, in a folder that exists; it is removed afterwards. busy: what the error says when another
    process holds it. Raises BusyError.
    """
    descriptor = _take_lock(file, busy)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object; raise CheckpointError naming the file and the line when it is none."""
    if not path.is_file():
        raise CheckpointError(f"no file {path}")
    try:
        value = parse_json(read_text(path, what="JSON file"), where=str(path))
    except UserError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; wanted a JSON object")
    return value


def read_text(path: Path, *, what: str, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Read UTF-8 text, with or without a byte order mark. what: the kind of file, for errors.

    Raises UserError where it cannot be read, has more than max_bytes, or is not UTF-8, with the line.
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
    """Raise UserError where a path is not a file, or cannot be one, as with a name that is too long."""
    try:
        is_file = path.is_file()
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {reason(error)}") from error
    if not is_file:
        raise UserError(f"no {what} at {path}")


def read_lines(path: Path, *, what: str, max_bytes: int = MAX_TEXT_BYTES) -> list[str]:
    """Read UTF-8 text as lines, divided at line feeds alone: a caption may hold other characters that end lines.

    Raises UserError as `read_text` does.
    """
    return [line.removesuffix("\r") for line in read_text(path, what=what, max_bytes=max_bytes).split("\n")]


def parse_json(text: str, *, where: str) -> Any:
    """Parse JSON. Raises UserError, which begins with `where`, for what is no JSON, nested too deep, or too long."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}" if "\n" in text.strip() else f"column {error.colno}"
        raise UserError(f"{where} is not JSON: {error.msg} in {place}") from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{where} is not JSON: it is nested too deep, or has too long a number") from error


def check_text(text: str, what: str) -> None:
    """Raise UserError where text holds half a surrogate pair, which no file, tokenizer or browser can take.

    what: names the text in the error, with its line where it has one.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        place = text[max(0, error.start - 20) : error.start]
        code = ord(text[error.start])
        # a byte of a command line that is not UTF-8 becomes one of these
        found = f"the byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"half a character (U+{code:04X})"
        raise UserError(
            f"{what} is not valid text: {found} follows {place!r}; write whole characters, in UTF-8"
        ) from error


def reason(error: Exception) -> str:
    """Say in a few words why the operating system, or a library in its place, refused."""
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    text = str(error)
    return text.rsplit(": ", 1)[-1].split(" (os error", 1)[0].lower()


@contextmanager
def _refused_by_the_disk(path: Path, temporary: Path) -> Iterator[None]:
    try:
        yield
    except WriteError as error:
        if isinstance(error.__cause__, OSError | SafetensorError) and not str(error).startswith(
            f"cannot write {path}: "
        ):
            raise WriteError(f"cannot write {path}: {reason(error.__cause__)}; {_what_is_there(path)}") from error
        raise
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and _is_elsewhere(error, temporary):
            raise  # a source that cannot be read
        raise WriteError(f"cannot write {path}: {reason(error)}; {_what_is_there(path)}") from error


def _is_elsewhere(error: OSError, temporary: Path) -> bool:
    if error.filename is None or isinstance(error.filename, int):
        return False
    named = Path(os.fsdecode(error.filename))
    return named != temporary and named not in temporary.parents and temporary not in named.parents


def _what_is_there(path: Path) -> str:
    with suppress(OSError):
        if path.exists():
            return "the older one is unchanged"
    return "nothing was left behind"


def _begin_folder(folder: Path, plan: object) -> None:
    """Make a temporary folder, or clear it unless it was begun with the same plan and may be filled further."""
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
    """Return the hidden name beside a path that ends in a suffix."""
    return path.with_name(f"{_temporary_stem(path)}{suffix}")


def _temporary_stem(path: Path) -> str:
    room = MAX_NAME_BYTES - UNIQUE_DIGITS - len(TEMPORARY_SUFFIX) - 2  # for two dots
    return "." + os.fsencode(path.name)[:room].decode("utf-8", "ignore")


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _take_lock(file: Path, busy: str) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        except FileNotFoundError:
            pass  # its last holder has removed it meanwhile
        except BlockingIOError as error:
            os.close(descriptor)
            raise BusyError(busy) from error
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once; return whether this system and file system can."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    return renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
