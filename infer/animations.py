"""Animations that grow part by part and play at any time: GIF and WebP.

Layouts: GIF89a, and the extended WebP file format (RFC 9649).
"""

from __future__ import annotations

import errno
import io
import struct
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from longvideo.data.pictures import DAMAGE
from longvideo.evaluation.palette import hold_colors, index_colors

if TYPE_CHECKING:
    from fractions import Fraction
    from pathlib import Path

    from longvideo.infer.fragments import VideoFormat

GIF_COLORS = 255  # one more marks pixels that do not change
UNCHANGED = GIF_COLORS
MANY_COLORS, ROUNDED_BITS, ROUNDED_MIDDLE = 2**14, np.uint8(0xFC), np.uint8(2)
GIF_TABLE = 256 * 3  # bytes of a color table
GIF_TABLE_FLAGS = 0x87  # a table of its own, with 256 entries
GIF_KEEP, GIF_TRANSPARENT = 0x04, 0x01
GIF_TICKS_PER_SECOND = 100
GIF_TRAILER = b";"
GIF_SCREEN_BYTES, GIF_DESCRIPTOR_BYTES = 13, 10
GIF_IMAGE, GIF_EXTENSION = 0x2C, 0x21
WEBP_TICKS_PER_SECOND = 1000
WEBP_ANIMATION, WEBP_NO_BLEND = 0x02, 0x02
MAX_RIFF_BYTES = 2**32 - 2
WEBP_BEST_QUALITY = 100


def count_pictures(path: Path) -> int:
    """Return the number of whole pictures of a GIF or WebP file; 0 for a missing file or another one."""
    count = 0
    try:
        with Image.open(path) as animation:
            for number in range(getattr(animation, "n_frames", 1)):
                animation.seek(number)
                animation.load()
                count += 1
    except DAMAGE:
        pass  # the end of the file is damaged; the pictures before it are shown
    return count


class GIF:
    """An endless GIF. The frames of a part have one palette, and pixels that hardly change keep their color."""

    def __init__(self, video_format: VideoFormat) -> None:
        self._format = video_format
        screen = struct.pack("<HH3B", video_format.width, video_format.height, 0, 0, 0)
        endless = b"\x21\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00"
        self.init = b"GIF89a" + screen + endless

    def part(self, frames: np.ndarray, *, start: int) -> bytes:
        indexed = hold_colors(index_colors(_few_colors(frames), limit=GIF_COLORS))
        table = indexed.palette.tobytes().ljust(GIF_TABLE, b"\x00")
        data = []
        for number, indices in enumerate(indexed.indices):
            changes = indices
            if number > 0:
                changes = np.where(indices == indexed.indices[number - 1], np.uint8(UNCHANGED), indices)
            delay = _duration(start + number, self._format.fps, GIF_TICKS_PER_SECOND)
            flags = GIF_KEEP | (GIF_TRANSPARENT if number > 0 else 0)
            control = struct.pack("<3BBHBB", GIF_EXTENSION, 0xF9, 4, flags, delay, UNCHANGED, 0)
            descriptor = struct.pack("<B4HB", GIF_IMAGE, 0, 0, self._format.width, self._format.height, GIF_TABLE_FLAGS)
            data.append(control + descriptor + table + _gif_pixels(changes))
        return b"".join(data)

    def patch(self, _num_frames: int, size: int) -> tuple[int, bytes] | None:
        return size, GIF_TRAILER

    def end(self, _entries: list[tuple[int, int]], offset: int) -> list[tuple[int, bytes]]:
        return [(offset, GIF_TRAILER)]

    def close(self) -> None:
        pass


class WebP:
    """An endless WebP animation. Every frame is a whole lossy picture, so that no earlier one stays in memory."""

    def __init__(self, video_format: VideoFormat) -> None:
        self._fps, self._quality = video_format.fps, WEBP_BEST_QUALITY - video_format.crf
        self._sides = _uint24(video_format.width - 1) + _uint24(video_format.height - 1)
        canvas = struct.pack("<B3x", WEBP_ANIMATION) + self._sides
        endless = struct.pack("<IH", 0, 0)  # transparent background, no end
        chunks = _chunk(b"VP8X", canvas) + _chunk(b"ANIM", endless)
        self.init = b"RIFF" + bytes(4) + b"WEBP" + chunks

    def part(self, frames: np.ndarray, *, start: int) -> bytes:
        data = []
        for number, pixels in enumerate(frames, start):
            duration = _uint24(_duration(number, self._fps, WEBP_TICKS_PER_SECOND))
            place = bytes(6) + self._sides + duration + bytes([WEBP_NO_BLEND])
            data.append(_chunk(b"ANMF", place + _webp_picture(pixels, self._quality)))
        return b"".join(data)

    def patch(self, _num_frames: int, size: int) -> tuple[int, bytes] | None:
        if size - 8 > MAX_RIFF_BYTES:
            raise OSError(errno.EFBIG, "a webp file cannot have more than 4 gib; use .webm, .mp4 or .mkv")
        return 4, struct.pack("<I", size - 8)

    def end(self, _entries: list[tuple[int, int]], _offset: int) -> list[tuple[int, bytes]]:
        return []

    def close(self) -> None:
        pass


def _few_colors(frames: np.ndarray) -> np.ndarray:
    """Round colors by at most 2 levels if the first frame has many: the time for a palette grows with their number."""
    values = frames[0].astype(np.int32)
    distinct = np.unique(values[..., 0] << 16 | values[..., 1] << 8 | values[..., 2]).size
    return frames if distinct <= MANY_COLORS else (frames & ROUNDED_BITS) + ROUNDED_MIDDLE


def _duration(frame: int, fps: Fraction, ticks_per_second: int) -> int:
    """Return how long a frame is shown, in ticks; the sum over all frames is the exact time, rounded once."""
    return round((frame + 1) * ticks_per_second / fps) - round(frame * ticks_per_second / fps)


def _gif_pixels(indices_HW: np.ndarray) -> bytes:
    """Return compressed pixels, as they follow the color table of an image."""
    memory = io.BytesIO()
    # as levels of gray, whose numbers stay what they are; a palette could be reordered
    Image.fromarray(indices_HW).save(memory, format="GIF", optimize=False, interlace=False)
    data = memory.getvalue()
    begin = GIF_SCREEN_BYTES + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    while data[begin] == GIF_EXTENSION:
        begin += 2
        while data[begin]:
            begin += 1 + data[begin]
        begin += 1
    assert data[begin] == GIF_IMAGE
    flags = data[begin + GIF_DESCRIPTOR_BYTES - 1]
    begin += GIF_DESCRIPTOR_BYTES + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    return data[begin : -len(GIF_TRAILER)]


def _webp_picture(pixels_HWC: np.ndarray, quality: int) -> bytes:
    """Return the chunk of a picture, without the header of its file."""
    memory = io.BytesIO()
    Image.fromarray(pixels_HWC).save(memory, format="WEBP", quality=quality)
    data = memory.getvalue()
    assert data[12:16] == b"VP8 ", "the encoder wrote other chunks than that of a lossy picture"
    return data[12:]


def _chunk(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


def _uint24(value: int) -> bytes:
    return value.to_bytes(3, "little")
