"""Write frames to a video file that can be played while it grows."""

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
from longvideo.infer.fragments import TICKS_PER_FRAME, FragmentedVideo, PartEncoder, VideoFormat, random_access
from longvideo.infer.options import shown, whole_number

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

MAX_FPS = 1000
MAX_CRF = 51  # largest value of H.264 with 8 bits
MAX_PART_SECONDS = 2.0
"""Largest length of a part. Each part starts with a key frame, which players need to seek."""


def check_output(path: str | Path, *, overwrite: bool) -> Path:
    """Return the path of a file that can be written. Nothing on the disk is changed.

    Raises UserError for an unknown suffix, for what `longvideo.files.check_target` refuses, and for a file that another
    process is writing.
    """
    path = Path(path)
    if path.suffix.lower() not in CONTAINERS:
        raise UserError(f"cannot write {path}: expected a name that ends in {' or '.join(CONTAINERS)}")
    check_target(path, overwrite=overwrite)
    check_unlocked(path)
    return path


def check_unlocked(path: Path) -> None:
    """Raise BusyError for a file that another process is writing. Nothing on the disk is changed."""
    if path.exists():
        with path.open("r+b") as file:
            _lock(file.fileno(), path)


def check_fps(fps: object) -> None:
    """Raise UserError for a value that is not a number of frames per second of a video."""
    if isinstance(fps, bool) or not isinstance(fps, Real) or not 0 < fps <= MAX_FPS:
        raise UserError(f"fps is {shown(fps)}; expected a number above 0 and at most {MAX_FPS}")


class VideoWriter:
    """Writes frames to an H.264 file. Frames that were written can be played, even if the process is killed.

    The file gets its name once its first frames are in it; an older file keeps the name until then. If the path is a
    link, its target is written.
    """

    def __init__(self, path: str | Path, *, fps: float, overwrite: bool = False, crf: int = 16) -> None:
        """Check the path and the options; nothing is written yet.

        path: file with the suffix .mp4 or .mkv. fps: frames per second. overwrite: whether a file that exists is
        replaced. crf: quality of H.264, 0 to 51; lower values give better pictures and larger files.
        Raises UserError for a value that cannot be used.
        """
        check_fps(fps)
        self.path = check_output(path, overwrite=overwrite)
        self._overwrite = overwrite
        self._fps = Fraction(float(fps)).limit_denominator(1001)
        self._crf = whole_number(crf, "crf", 0, MAX_CRF)
        self._output: _Output | None = None
        self._num_frames = 0

    @property
    def num_frames(self) -> int:
        """Number of frames in the file under its name."""
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
        """Encode frames and write them to the disk.

        frames: uint8 [T, H, W, 3], of one size for all calls, with an even height and width.
        Raises WriteError when the disk refuses them; the frames before them can still be played.
        """
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise UserError(f"frames are {frames.dtype} {list(frames.shape)}; expected uint8 [T, H, W, 3]")
        part_frames = max(1, round(MAX_PART_SECONDS * self._fps))
        for begin in range(0, len(frames), part_frames):
            output = self._output or self._begin(*frames.shape[1:3])
            if frames.shape[1:3] != output.size:
                raise UserError(
                    f"height and width of the frames are {frames.shape[1:3]}; expected {output.size} as before"
                )
            try:
                with _Refused(self):
                    output.append(frames[begin : begin + part_frames])
                    if not output.is_published():
                        output.publish(overwrite=self._overwrite)
            except WriteError:
                if not output.is_published():
                    self.close()  # removes the file
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
            raise UserError(
                f"frames are {width} x {height}; expected an even width and height, as H.264 with 4:2:0 color needs"
            )
        new_container = CONTAINERS[self.path.suffix.lower()]
        container = new_container(VideoFormat(width, height, self._fps, self._crf, profile="high"))
        with _Refused(self):
            self._output = _Output(Path(os.path.realpath(self.path)), container, size=(height, width))
        return self._output


class Container(Protocol):
    """The layout of a file that grows part by part. init: bytes before the first part."""

    init: bytes

    def part(self, frames: np.ndarray, *, start: int) -> bytes:
        """Return the bytes of a part. frames: uint8 [T, H, W, 3]. start: number of the first one in the video."""
        ...

    def patch(self, num_frames: int, /) -> tuple[int, bytes] | None:
        """Return an offset in the file and the bytes to write there once it has this many frames; None for none."""
        ...

    def end(self, entries: list[tuple[int, int]], offset: int) -> list[tuple[int, bytes]]:
        """Return offsets and bytes to write at the end.

        entries: first frame and offset of each part. offset: size of the file so far, in bytes.
        """
        ...

    def close(self) -> None:
        """Free the encoder."""
        ...


class FragmentedMP4:
    """MP4 whose parts are fragments, with an index of the fragments at the end."""

    def __init__(self, video_format: VideoFormat) -> None:
        self._video = FragmentedVideo(video_format)
        self._ticks = TICKS_PER_FRAME * video_format.fps.denominator
        self.init = self._video.init

    def part(self, frames: np.ndarray, *, start: int) -> bytes:
        return self._video.encode(frames, start=start).data

    def patch(self, _num_frames: int) -> tuple[int, bytes] | None:
        return None

    def end(self, entries: list[tuple[int, int]], offset: int) -> list[tuple[int, bytes]]:
        return [(offset, random_access(entries, ticks=self._ticks))]

    def close(self) -> None:
        self._video.close()


class Matroska:
    """Matroska whose parts are clusters, with an index of the clusters at the end.

    The header has the length of the video, and once it is finished the place of the index.
    """

    def __init__(self, video_format: VideoFormat) -> None:
        self._encoder = PartEncoder(video_format)
        self._fps = video_format.fps
        self._header = matroska.header(video_format, avcc=self._encoder.avcc)
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


CONTAINERS: dict[str, Callable[[VideoFormat], Container]] = {".mp4": FragmentedMP4, ".mkv": Matroska}


class _Output:
    """An open file. It has a temporary name in the same folder until it is published.

    The file is locked while it is open, so a temporary file without a lock can be removed.
    """

    def __init__(self, target: Path, container: Container, *, size: tuple[int, int]) -> None:
        """Create the file. size: height and width of its frames."""
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
        """Write a part. If that fails, the file counts as if nothing had been written."""
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
        """Rename the file to its final name."""
        os.fsync(self._file)
        if overwrite:
            self._temporary.replace(self._target)
        else:
            _rename_to_unused(self._temporary, self._target)
        flush(self._target.parent)

    def finish(self) -> None:
        """Remove an incomplete part, and write the index."""
        os.ftruncate(self._file, self._end)
        try:
            for offset, data in self._container.end(self._entries, self._end):
                _write_at(self._file, data, offset)
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, self._end)
            raise

    def release(self) -> None:
        """Close the file, and remove it if it is not published."""
        self._container.close()
        self._temporary.unlink(missing_ok=True)
        os.close(self._file)


class _Refused:
    """Converts an error of the disk to a WriteError with the number of frames that are still in the file."""

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
            whole = f"{before} in it" if frames else "no files remain"
            raise WriteError(f"cannot write {path}: {reason(error)}; {whole}") from error


def _rename_to_unused(source: Path, target: Path) -> None:
    """Rename a file. Raises FileExistsError if the target exists by now."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links; two processes could still use one name at the same time
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        source.replace(target)
    else:
        source.unlink()


def _write_at(file: int, data: bytes, offset: int) -> None:
    """Write all bytes at an offset."""
    left = memoryview(data)
    while left:  # a disk that is nearly full writes a part, and fails at the next
        count = os.pwrite(file, left, offset)
        left, offset = left[count:], offset + count


def _new_temporary(target: Path) -> tuple[Path, int]:
    """Open and lock a temporary file in the folder of another file; return its name and descriptor."""
    while True:
        name = temporary_name(target)
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with suppress(BusyError):
            _lock(file, name)
            if os.fstat(file).st_nlink:
                return name, file
        os.close(file)  # another process removed it before it was locked


def _lock(file: int, path: Path) -> None:
    """Lock an open file until it is closed. Raises BusyError if another process has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BusyError(f"cannot write {path}: another process is writing it; choose another name") from error


def _remove_abandoned(temporary: Path) -> None:
    """Remove a temporary file whose writer was killed."""
    with suppress(OSError, BusyError), temporary.open("rb") as file:
        _lock(file.fileno(), temporary)
        temporary.unlink()
