"""The file of a live stream: segments of fragmented MP4, of which later ones may replace earlier ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from longvideo.errors import UserError
from longvideo.infer.fragments import TICKS_PER_FRAME, Segment, boxes, segment_times


class StreamFile:
    """The file of a stream: its initialisation segment, then segments; a later one replaces what it repeats."""

    def __init__(self, path: Path, init: bytes) -> None:
        """Begin a file, or go on with the one that is there; raise UserError when that has another beginning."""
        self.path = path
        self._file = path.open("r+b" if path.exists() else "x+b", buffering=0)
        self._parts: list[tuple[int, int, int]] = []  # first frame, frame behind the last, offset of the segment
        content = self._file.read()
        if content and not content.startswith(init):
            self._file.close()
            raise UserError(f"{path} was begun by another version of the encoder; start a new video")
        if not content:
            self._file.write(init)
        self._end = len(init)
        for start, frames, end in _whole_segments(content, len(init)):
            self._parts.append((start, start + frames, self._end))
            self._end = end

    @property
    def num_frames(self) -> int:
        """Frames in the file, in which there are no gaps."""
        return self._parts[-1][1] if self._parts else 0

    def append(self, segment: Segment) -> None:
        """Write a segment behind those that come before it; those from its start on are dropped."""
        while self._parts and self._parts[-1][0] >= segment.start:
            self._end = self._parts.pop()[2]
        assert self.num_frames == segment.start, f"frame {segment.start} follows {self.num_frames}"
        self._file.truncate(self._end)
        self._file.seek(self._end)
        left = memoryview(segment.data)
        while left:  # a disk that is nearly full takes a part, and refuses the next
            left = left[self._file.write(left) :]
        self._parts.append((segment.start, segment.start + segment.frames, self._end))
        self._end += len(segment.data)

    def close(self) -> None:
        """Close the file. Closing twice does nothing."""
        self._file.close()


def _whole_segments(content: bytes, begin: int) -> Iterator[tuple[int, int, int]]:
    """Yield the first frame, the frames and the end of each segment that is whole."""
    times: tuple[int, int] | None = None
    for kind, first, end in boxes(content, begin):
        if kind == b"moof":
            times = segment_times(content, first, end)
        elif kind == b"mdat" and times is not None:
            yield times[0] // TICKS_PER_FRAME, times[1], end
