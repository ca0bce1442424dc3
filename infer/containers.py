"""The layouts of video files that grow part by part, by the suffix of the file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from longvideo.infer import matroska
from longvideo.infer.animations import GIF, WebP
from longvideo.infer.fragments import TICKS_PER_FRAME, FragmentedVideo, PartEncoder, VideoFormat, random_access
from longvideo.infer.vp9 import VP9Encoder

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np


class Container(Protocol):
    """The layout of a file that grows part by part. init: bytes before the first part."""

    init: bytes

    def part(self, frames: np.ndarray, *, start: int) -> bytes:
        """Return the bytes of a part. frames: uint8 [T, H, W, 3]. start: number of the first one in the video."""
        ...

    def patch(self, num_frames: int, size: int, /) -> tuple[int, bytes] | None:
        """Return an offset in the file and the bytes to write there after a part; None for none.

        num_frames: frames in the file so far. size: bytes in the file so far. Raises OSError for a size that the format
        does not allow.
        """
        ...

    def end(self, entries: list[tuple[int, int]], offset: int, /) -> list[tuple[int, bytes]]:
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

    def patch(self, _num_frames: int, _size: int) -> tuple[int, bytes] | None:
        return None

    def end(self, entries: list[tuple[int, int]], offset: int) -> list[tuple[int, bytes]]:
        return [(offset, random_access(entries, ticks=self._ticks))]

    def close(self) -> None:
        self._video.close()


class Clusters:
    """A file in the format of Matroska, without an encoder: a cluster for each part, and their index at the end.

    The header states the length of the video, and once it is finished the place of the index.
    """

    def __init__(self, video_format: VideoFormat, *, doc_type: bytes, codec: bytes, private: bytes = b"") -> None:
        """Write the header. The arguments are those of `matroska.header`."""
        self._fps = video_format.fps
        self._header = matroska.header(video_format, doc_type=doc_type, codec=codec, private=private)
        self.init = self._header.data

    def patch(self, num_frames: int, _size: int) -> tuple[int, bytes] | None:
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


class Matroska(Clusters):
    """H.264 in Matroska."""

    def __init__(self, video_format: VideoFormat) -> None:
        self._encoder = PartEncoder(video_format)
        super().__init__(video_format, doc_type=b"matroska", codec=b"V_MPEG4/ISO/AVC", private=self._encoder.avcc)

    def part(self, frames: np.ndarray, *, start: int) -> bytes:
        return matroska.cluster(self._encoder.encode(frames), start=start, fps=self._fps)

    def close(self) -> None:
        self._encoder.close()


class WebM(Clusters):
    """VP9 in WebM."""

    def __init__(self, video_format: VideoFormat) -> None:
        self._encoder = VP9Encoder(video_format)
        super().__init__(video_format, doc_type=b"webm", codec=b"V_VP9")

    def part(self, frames: np.ndarray, *, start: int) -> bytes:
        return matroska.cluster(self._encoder.encode(frames), start=start, fps=self._fps)

    def close(self) -> None:
        pass


CONTAINERS: dict[str, Callable[[VideoFormat], Container]] = {
    ".mp4": FragmentedMP4,
    ".mkv": Matroska,
    ".webm": WebM,
    ".gif": GIF,
    ".webp": WebP,
}
ANIMATIONS = frozenset({".gif", ".webp"})
"""Formats of pictures that move."""
EVEN_SIDES = frozenset({".mp4", ".mkv", ".webm"})
"""Formats whose color has half the resolution, so that width and height are even."""
MAX_RATES = {".gif": 50}
"""Frames per second that a format can show: browsers show a GIF with shorter delays than 0.02 s at 10 per second."""
