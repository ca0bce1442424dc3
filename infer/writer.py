"""Write frames to a video file that grows and plays while it is made."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from longvideo.errors import UserError
from longvideo.files import BusyError, WriteError, check_target, flush, reason, temporary_name, temporary_names
from longvideo.infer import matroska
from longvideo.infer.fragments import TICKS_PER_FRAME, FragmentedVideo, PartEncoder, random_access
from longvideo.infer.options import shown, whole_number

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

MAX_FPS = 1000
MAX_CRF = 51  # of H.264 in 8 bits
MOST_SECONDS = 2.0
"""Length of a part at most, so that a player finds a key frame as often."""


def check_output(path: str | Path, *, overwrite: bool) -> Path:
    """Return the file that will be written, or raise UserError; nothing on the disk is changed.

    Refused: an unknown suffix, what `longvideo.files.check_target` refuses, and a file that another process is writing.
    """
    path = Path(path)
    if path.suffix.lower() not in CONTAINERS:
        raise UserError(f"cannot write {path}: the name must end in {' or '.join(CONTAINERS)}")
    check_target(path, overwrite=overwrite, remedy="pass --overwrite")
    if path.exists():
        with path.open("r+b") as file:
            _lock(file.fileno(), path)
    return path


class VideoWriter:
    """Append uint8 frames [T, H, W, 3] to an H.264 file; what was appended plays, even if the process is killed.

    The file gets its name when its first frames are in it; until then an older file has it. A link is written through.
    Sizes must be even (4:2:0 color). Lower `crf` means better pictures and larger files.
    """

    def __init__(self, path: str | Path, *, fps: float, overwrite: bool = False, crf: int = 16) -> None:
        if isinstance(fps, bool) or not isinstance(fps, Real) or not 0 < fps <= MAX_FPS:
            raise UserError(f"fps is {shown(fps)}; it must be a number above 0 and at most {MAX_FPS}")
        self.path = check_output(path, overwrite=overwrite)
        self._overwrite = overwrite
        self._fps = Fraction(float(fps)).limit_denominator(1001)
        self._crf = whole_number(crf, "crf", 0, MAX_CRF)
        self._output: _Output | None = None
        self._num_frames = 0

    @property
    def num_frames(self) -> int:
        """Frames that are in the file under its name."""
        if self._output is not None and self._output.is_published():
            self._num_frames = self._output.num_frames
        return self._num_frames

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, frames: np.ndarray) -> None:
        """Encode frames [T, H, W, 3] and put them on the disk; raise WriteError when the disk refuses them.

        After that, what was written before stays whole and plays.
        """
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise UserError(f"frames are {frames.dtype} {list(frames.shape)}; uint8 [T, H, W, 3] was expected")
        most = max(1, round(MOST_SECONDS * self._fps))
        for begin in range(0, len(frames), most):
            output = self._output or self._begin(*frames.shape[1:3])
            if frames.shape[1:3] != output.size:
                raise UserError(f"frames are {frames.shape[1:3]}; those before were {output.size}, height and width")
            try:
                with _Refused(self):
                    output.append(frames[begin : begin + most])
                    if not output.is_published():
                        output.publish(overwrite=self._overwrite)
            except WriteError:
                if not output.is_published():
                    self.close()  # leaves nothing
                raise

    def close(self) -> None:
        """Finish the file. Closing twice does nothing."""
        if self._output is None:
            return
        frames = self.num_frames
        output, self._output = self._output, None
        try:
            if frames:
                with _Refused(self):
                    output.finish()
        finally:
            output.release()

    def _begin(self, height: int, width: int) -> _Output:
        if width % 2 or height % 2:
            raise UserError(f"frames are {width} x {height}; H.264 with 4:2:0 color needs an even width and height")
        container = CONTAINERS[self.path.suffix.lower()](width, height, self._fps, self._crf)
        with _Refused(self):
            self._output = _Output(Path(os.path.realpath(self.path)), container, size=(height, width))
        return self._output


class Container(Protocol):
    """The layout of a file that grows part by part. init: what comes before the first part."""

    init: bytes

    def part(self, frames: np.ndarray, *, start: int) -> bytes:
        """Return a part, of frames from `start` on."""
        ...

    def patch(self, num_frames: int) -> tuple[int, bytes] | None:
        """Return an offset in the file and what is written there once this many frames are in it."""
        ...

    def end(self, entries: list[tuple[int, int]], offset: int) -> list[tuple[int, bytes]]:
        """Return what finishes a file of `offset` bytes, by offset. entries: first frame and offset of each part."""
        ...

    def close(self) -> None:
        """Let the encoder go."""
        ...


class FragmentedMP4:
    """A part is a fragment; an index of them comes last."""

    def __init__(self, width: int, height: int, fps: Fraction, crf: int) -> None:
        self._video = FragmentedVideo(width=width, height=height, fps=fps, crf=crf, profile="high")
        self._ticks = TICKS_PER_FRAME * fps.denominator
        self.init = self._video.init

    def part(self, frames: np.ndarray, *, start: int) -> bytes:
        return self._video.encode(frames, start=start).data

    def patch(self, num_frames: int) -> tuple[int, bytes] | None:
        return None

    def end(self, entries: list[tuple[int, int]], offset: int) -> list[tuple[int, bytes]]:
        return [(offset, random_access(entries, ticks=self._ticks))]

    def close(self) -> None:
        self._video.close()


class Matroska:
    """A part is a cluster; the header says how long the video is, and at the end where the index of clusters is."""

    def __init__(self, width: int, height: int, fps: Fraction, crf: int) -> None:
        self._encoder = PartEncoder(width=width, height=height, fps=fps, crf=crf, profile="high")
        self._fps = fps
        self._header = matroska.header(width=width, height=height, fps=fps, avcc=self._encoder.avcc)
        self.init = self._header.data

    def part(self, frames: np.ndarray, *, start: int) -> bytes:
        return matroska.cluster(self._encoder.encode(frames), start=start, fps=self._fps)

    def patch(self, num_frames: int) -> tuple[int, bytes] | None:
        return self._header.duration_offset, matroska.duration(num_frames, fps=self._fps)

    def end(self, entries: list[tuple[int, int]], offset: int) -> list[tuple[int, bytes]]:
        begin = self._header.segment_begin
        index = matroska.index(entries, fps=self._fps, segment_begin=begin)
        size = matroska.segment_size(offset + len(index) - begin)
        return [
            (offset, index),
            (self._header.seek_head_offset, matroska.seek_head(offset, segment_begin=begin)),
            (begin - len(size), size),
        ]

    def close(self) -> None:
        self._encoder.close()


CONTAINERS: dict[str, Callable[[int, int, Fraction, int], Container]] = {".mp4": FragmentedMP4, ".mkv": Matroska}


class _Output:
    """An open file under a temporary name beside the final one, until it is published.

    It is locked as long as it is open: whoever finds a temporary file that is not locked can remove it.
    """

    def __init__(self, target: Path, container: Container, *, size: tuple[int, int]) -> None:
        """size: height and width of its frames."""
        for abandoned in temporary_names(target):
            _remove_abandoned(abandoned)
        self._target, self._container, self.size = target, container, size
        self._temporary, self._file = _new_temporary(target)
        self._entries: list[tuple[int, int]] = []
        self._end = self.num_frames = 0

    def is_published(self) -> bool:
        """Whether the file has its name."""
        try:
            return os.path.samestat(self._target.stat(), os.fstat(self._file))
        except FileNotFoundError:
            return False

    def append(self, frames: np.ndarray) -> None:
        """Write a part, all of it or nothing."""
        part = self._container.part(frames, start=self.num_frames)
        data = part if self._entries else self._container.init + part
        offset = self._end + len(data) - len(part)
        _write_at(self._file, data, self._end)
        if patch := self._container.patch(self.num_frames + len(frames)):
            _write_at(self._file, patch[1], patch[0])
        self._entries.append((self.num_frames, offset))
        self._end += len(data)
        self.num_frames += len(frames)

    def publish(self, *, overwrite: bool) -> None:
        """Give the file its name."""
        os.fsync(self._file)
        if overwrite:
            self._temporary.replace(self._target)
        else:
            _rename_to_unused(self._temporary, self._target)
        flush(self._target.parent)

    def finish(self) -> None:
        """Drop what is not whole, and write the index."""
        os.ftruncate(self._file, self._end)
        try:
            for offset, data in self._container.end(self._entries, self._end):
                _write_at(self._file, data, offset)
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, self._end)
            raise

    def release(self) -> None:
        """Close the file, and remove it if it has no name yet."""
        self._container.close()
        self._temporary.unlink(missing_ok=True)
        os.close(self._file)


class _Refused:
    """Turns what the disk refuses into one line that says what is still whole."""

    def __init__(self, writer: VideoWriter) -> None:
        self._writer = writer

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError):
            path, frames = self._writer.path, self._writer.num_frames
            before = "the frame before is" if frames == 1 else f"the {frames} frames before are"
            whole = f"{before} in it" if frames else "nothing was left behind"
            raise WriteError(f"cannot write {path}: {reason(error)}; {whole}") from error


def _rename_to_unused(source: Path, target: Path) -> None:
    """Rename a file. Raises FileExistsError if another process has taken the name meanwhile."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system that knows no links: there two processes could still meet
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        source.replace(target)
    else:
        source.unlink()


def _write_at(file: int, data: bytes, offset: int) -> None:
    left = memoryview(data)
    while left:  # a disk that is nearly full takes a part, and refuses the next
        count = os.pwrite(file, left, offset)
        left, offset = left[count:], offset + count


def _new_temporary(target: Path) -> tuple[Path, int]:
    """Open and lock a temporary file beside another one."""
    while True:
        name = temporary_name(target)
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with suppress(BusyError):
            _lock(file, name)
            if os.fstat(file).st_nlink:
                return name, file
        os.close(file)  # another process took it for abandoned before it was locked


def _lock(file: int, path: Path) -> None:
    """Lock an open file until it is closed. Raises BusyError where another process has done so."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BusyError(f"cannot write {path}: another process is writing it; choose another name") from error


def _remove_abandoned(temporary: Path) -> None:
    """Remove a temporary file whose writer was killed."""
    with suppress(OSError, BusyError), temporary.open("rb") as file:
        _lock(file.fileno(), temporary)
        temporary.unlink()
