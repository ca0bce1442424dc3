"""Write frames to a video file that can be played while it grows, or to pictures."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

from longvideo.errors import UserError, shown
from longvideo.files import BusyError, WriteError, check_target, flush, reason, temporary_name, temporary_names
from longvideo.infer.animations import count_pictures
from longvideo.infer.closing import ClosedAtEnd
from longvideo.infer.containers import ANIMATIONS, CONTAINERS, EVEN_SIDES, MAX_RATES
from longvideo.infer.fragments import VideoFormat
from longvideo.infer.options import check_frames, whole_number
from longvideo.infer.picture_folder import count_folder_pictures
from longvideo.infer.pictures import EXAMPLE, PNG, PictureWriter, check_pictures

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np

    from longvideo.infer.containers import Container

MAX_FPS = 1000
MAX_CRF = 51  # largest value of H.264 with 8 bits
MAX_PART_SECONDS = 2.0
"""Largest length of a part. Each part starts with a key frame, which players need to seek."""


@dataclass(frozen=True)
class OutputFile:
    """The place for the frames of a video.

    path: video file, or the pattern of numbered pictures, such as `frames/%05d.png`. overwrite: whether files that
    exist are replaced.
    """

    path: Path
    overwrite: bool = False

    def check(self) -> None:
        """Raise UserError for a file that cannot be written. Nothing on the disk is changed.

        It is refused for an unknown suffix, for what `longvideo.files.check_target` or `check_pictures` refuses, and
        where another process is writing it.
        """
        suffix = self.path.suffix.lower()
        if suffix == PNG:
            check_pictures(self.path, overwrite=self.overwrite)
            return
        if suffix not in CONTAINERS:
            expected = f"expected a name that ends in {', '.join(CONTAINERS)}, or {EXAMPLE}"
            raise UserError(f"cannot write {self.path}: {expected}")
        check_target(self.path, overwrite=self.overwrite)
        if self.path.exists():
            with self.path.open("r+b") as file:
                _lock(file.fileno(), self.path)

    def open(self, *, fps: float) -> VideoWriter | PictureWriter:
        """Return a writer. Pictures have no frame rate. The errors are those of `VideoWriter`."""
        if self.path.suffix.lower() == PNG:
            return PictureWriter(self.path, overwrite=self.overwrite)
        return VideoWriter(self.path, fps=fps, overwrite=self.overwrite)


def check_fps(fps: float) -> None:
    """Raise UserError for a value that is not a number of frames per second of a video."""
    if isinstance(fps, bool) or not isinstance(fps, Real) or not 0 < fps <= MAX_FPS:
        raise UserError(f"fps is {shown(fps)}; expected a number above 0 and at most {MAX_FPS}")


def check_rate(fps: float, suffix: str) -> None:
    """Raise UserError for more frames per second than the format of a suffix can show."""
    if fps > (most := MAX_RATES.get(suffix, MAX_FPS)):
        raise UserError(f"fps is {fps:g}; expected at most {most} in {suffix}; use .webp or .webm")


def count_playable_frames(path: Path) -> int:
    """Return the number of frames that can be decoded; 0 for a missing file or one that is not a video.

    path: video file, or a folder of pictures.
    """
    import av

    if path.is_dir():
        return count_folder_pictures(path)
    if path.suffix.lower() in ANIMATIONS:
        return count_pictures(path)
    frames = 0
    try:
        with av.open(str(path)) as container:
            for _ in container.decode(video=0):
                frames += 1
    except (av.FFmpegError, FileNotFoundError):
        pass  # the end of the file is damaged; the frames before it play
    return frames


class VideoWriter(ClosedAtEnd):
    """Writes frames to a video file. Frames that were written can be played, even if the process is killed.

    The file gets its name once its first frames are in it; an older file keeps the name until then. If the path is a
    link, its target is written.
    """

    def __init__(self, path: str | Path, *, fps: float, overwrite: bool = False, crf: int = 16) -> None:
        """Check the path and the options; nothing is written yet.

        path: file with the suffix .mp4 or .mkv (H.264), .webm (VP9), .gif or .webp. fps: frames per second. overwrite:
        whether a file that exists is replaced. crf: quality in H.264's scale, 0 to 51; lower values give better
        pictures and larger files. A GIF has no such choice.
        Raises UserError for a value that cannot be used.
        """
        check_fps(fps)
        if (suffix := Path(path).suffix.lower()) == PNG:
            raise UserError(f"cannot write {path} as one file; expected a name that ends in {', '.join(CONTAINERS)}")
        check_rate(fps, suffix)
        self.path, self._overwrite = Path(path), overwrite
        OutputFile(self.path, overwrite).check()
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

    @property
    def num_bytes(self) -> int:
        """Size of the file under its name."""
        return self.path.stat().st_size if self.num_frames else 0

    def write(self, frames: np.ndarray) -> None:
        """Encode frames and write them to the disk.

        frames: uint8 [T, H, W, 3], of one size for all calls. Height and width are even, except in .gif and .webp.
        Raises WriteError when the disk refuses them; the frames before them can still be played.
        """
        check_frames(frames)
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
        suffix = self.path.suffix.lower()
        if (width % 2 or height % 2) and suffix in EVEN_SIDES:
            raise UserError(
                f"frames are {width} x {height}; expected an even width and height, as 4:2:0 color needs; use .gif,"
                " .webp or .png"
            )
        new_container = CONTAINERS[suffix]
        container = new_container(VideoFormat(width, height, self._fps, self._crf, profile="high"))
        with _Refused(self):
            self._output = _Output(Path(os.path.realpath(self.path)), container, size=(height, width))
        return self._output


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
        if patch := self._container.patch(self.num_frames + len(frames), self._end + len(data)):
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
