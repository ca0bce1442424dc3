"""The file of a live stream: segments of fragmented MP4, of which later ones may replace earlier ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from longvideo.errors import UserError
from longvideo.files import WriteError, reason
from longvideo.infer.fragments import TICKS_PER_FRAME, Segment, boxes, segment_times


class StreamFile:
    """The file of a stream: its initialisation segment, then segments; a later one replaces what it repeats."""

    def __init__(self, path: Path, init: bytes) -> None:
        """Begin a file, or resume the one that is there.

        Raises WriteError where the disk refuses, and UserError where the file has another beginning.
        """
        self.path = path
        try:
            self._file = path.open("r+b" if path.exists() else "x+b", buffering=0)
        except OSError as error:
            raise WriteError(f"cannot write {path}: {reason(error)}") from error
        self._parts: list[tuple[int, int, int]] = []  # first frame, frame behind the last, offset of the segment
        content = self._file.read()
        if content and not content.startswith(init):
            self._file.close()
            raise UserError(f"{path} was begun by another version of the encoder; start a new video")
        if not content:
            self._write(init, at=0)
        self._end = len(init)
        for start, frames, end in _whole_segments(content, len(init)):
            self._parts.append((start, start + frames, self._end))
            self._end = end

    @property
    def num_frames(self) -> int:
        """Frames in the file, in which there are no gaps."""
        return self._parts[-1][1] if self._parts else 0

    def append(self, segment: Segment) -> None:
        """Write a segment after those that come before it; those from its start on are dropped.

        Raises WriteError where the disk refuses; the file then ends with the segment before.
        """
        while self._parts and self._parts[-1][0] >= segment.start:
            self._end = self._parts.pop()[2]
        assert self.num_frames == segment.start, f"frame {segment.start} follows {self.num_frames}"
        self._write(segment.data, at=self._end)
        self._parts.append((segment.start, segment.start + segment.frames, self._end))
        self._end += len(segment.data)

    def close(self) -> None:
        """Close the file. Closing twice does nothing."""
        self._file.close()

    def _write(self, data: bytes, *, at: int) -> None:
        """End the file with this."""
        try:
            self._file.truncate(at)
            self._file.seek(at)
            left = memoryview(data)
            while left:  # a disk that is nearly full takes a part, and refuses the next
                left = left[self._file.write(left) :]
        except OSError as error:
            self._file.truncate(at)
            if at == 0:
                self.path.unlink(missing_ok=True)
            raise WriteError(f"cannot write {self.path}: {reason(error)}") from error


def _whole_segments(content: bytes, begin: int) -> Iterator[tuple[int, int, int]]:
    """Yield the first frame, the frames and the end of each segment that is whole."""
    times: tuple[int, int] | None = None
    for kind, first, end in boxes(content, begin):
        if kind == b"moof":
            times = segment_times(content, first, end)
        elif kind == b"mdat" and times is not None:
            yield times[0] // TICKS_PER_FRAME, times[1], end
