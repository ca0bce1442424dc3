"""The file of a live stream: segments of fragmented MP4. Later segments may replace earlier ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from longvideo.errors import UserError
from longvideo.files import WriteError, reason
from longvideo.infer.fragments import TICKS_PER_FRAME, Segment, boxes, segment_times


class StreamFile:
    """A file with an initialization segment, followed by media segments.

    A segment that starts at an earlier frame replaces the segments from that frame on.
    """

    def __init__(self, path: Path, init: bytes) -> None:
        """Create a file, or open an existing one and continue after its last whole segment.

        init: initialization segment. Raises WriteError where the file cannot be written, and UserError where an
        existing file has another initialization segment.
        """
        self.path = path
        try:
            self._file = path.open("r+b" if path.exists() else "x+b", buffering=0)
        except OSError as error:
            raise WriteError(f"cannot write {path}: {reason(error)}") from error
        self._parts: list[tuple[int, int, int]] = []  # first frame, frame after the last, offset in bytes
        content = self._file.read()
        if content and not content.startswith(init):
            self._file.close()
            raise UserError(f"{path} was written by another version of the encoder; start a new video")
        if not content:
            self._write(init, at=0)
        self._end = len(init)
        for start, frames, end in _whole_segments(content, len(init)):
            self._parts.append((start, start + frames, self._end))
            self._end = end

    @property
    def num_frames(self) -> int:
        """Number of frames in the file. There are no gaps."""
        return self._parts[-1][1] if self._parts else 0

    def append(self, segment: Segment) -> None:
        """Write a segment after the frames before it; existing segments from its first frame on are removed.

        Raises WriteError where the segment cannot be written; the file then ends with the previous segment.
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
        """Write data at an offset, where the file ends after it. Raises WriteError."""
        try:
            self._file.truncate(at)
            self._file.seek(at)
            remainder = memoryview(data)
            while remainder:  # a disk that is nearly full writes a part first, then raises
                remainder = remainder[self._file.write(remainder) :]
        except OSError as error:
            self._file.truncate(at)
            if at == 0:
                self.path.unlink(missing_ok=True)
            raise WriteError(f"cannot write {self.path}: {reason(error)}") from error


def _whole_segments(content: bytes, begin: int) -> Iterator[tuple[int, int, int]]:
    """Yield the first frame, the number of frames and the end offset of each whole segment."""
    times: tuple[int, int] | None = None
    for kind, first, end in boxes(content, begin):
        if kind == b"moof":
            times = segment_times(content, first, end)
        elif kind == b"mdat" and times is not None:
            yield times[0] // TICKS_PER_FRAME, times[1], end
