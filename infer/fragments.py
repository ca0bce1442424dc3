"""Fragmented MP4 made part by part: every part of a chunk is a segment that begins with a key frame.

Box layouts: ISO/IEC 14496-12 (the file format) and 14496-15 (H.264 in it).
"""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from av import VideoFrame

TRACK = 1
TICKS_PER_FRAME = 512
CRF = 18
BT709 = 1  # ISO/IEC 23091-2 code of primaries, transfer and matrix alike
LONGEST_PART = 10_000  # frames between key frames that the encoder places by itself: more than any part has

DEFAULT_BASE_IS_MOOF, DEFAULT_DURATION, DEFAULT_FLAGS = 0x020000, 0x08, 0x20  # of tfhd
DATA_OFFSET, FIRST_FLAGS, SAMPLE_SIZES = 0x01, 0x04, 0x200  # of trun
KEY_FRAME, OTHER_FRAME = 0x02000000, 0x01010000  # of samples: depends on no other; depends on others, no sync sample
START_CODE = re.compile(b"\x00\x00\x00?\x01")


@dataclass(frozen=True)
class Segment:
    """A media segment (moof and mdat) of the frames from `start` on."""

    data: bytes
    start: int
    frames: int


class PartEncoder:
    """Encode parts of a video in H.264; each begins with a key frame, and nothing of a part waits for the next.

    init: ftyp and moov of a fragmented MP4. avcc: the decoder's configuration (avcC), as MP4 and Matroska hold it.
    """

    def __init__(self, *, width: int, height: int, fps: Fraction, crf: int = CRF, profile: str = "baseline") -> None:
        import av

        memory = io.BytesIO()
        timescale = str(fps.numerator * TICKS_PER_FRAME)
        options = {"movflags": "empty_moov+default_base_moof", "video_track_timescale": timescale}
        self._container = av.open(memory, "w", format="mp4", options=options)
        encoder_options = {
            "profile": profile,
            "preset": "veryfast",
            "tune": "zerolatency",
            "crf": str(crf),
            "g": str(LONGEST_PART),
            "sc_threshold": "0",
            "forced-idr": "1",
        }
        self._stream = self._container.add_stream("libx264", rate=fps, options=encoder_options)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        codec: Any = self._stream.codec_context
        codec.thread_count = 1  # threads would slice the frame, which costs bits, and take cores from the model
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        codec.color_range = 1  # limited range
        self._container.start_encoding()
        self._fps = fps
        self._encoded = 0
        self.init = memory.getvalue()
        self.avcc = _decoder_configuration(self.init)

    def encode(self, frames: np.ndarray) -> list[bytes]:
        """Encode a part, uint8 [T, H, W, 3]: for each frame its NAL units, with their lengths before them."""
        from av.video.frame import PictureType

        samples = []
        for offset, pixels in enumerate(frames):
            picture = _yuv_picture(pixels)
            # the encoder's own clock: after a seek the video's goes back, which x264 refuses
            picture.pts, picture.time_base = self._encoded, 1 / self._fps
            picture.pict_type = PictureType.I if offset == 0 else PictureType.NONE
            packets = self._stream.encode(picture)
            assert len(packets) == 1, "the encoder held a frame back"
            samples.append(_length_prefixed(bytes(packets[0])))
            self._encoded += 1
        return samples

    def close(self) -> None:
        """Let the encoder go. Closing twice does nothing."""
        self._container.close()


class FragmentedVideo:
    """Encode parts of one video as segments of fragmented MP4.

    init: initialisation segment (ftyp and moov), the same for equal sizes. mime: for MediaSource. options: as of
    `PartEncoder`.
    """

    def __init__(self, *, width: int, height: int, fps: int | Fraction, **options: Any) -> None:
        self._encoder = PartEncoder(width=width, height=height, fps=Fraction(fps), **options)
        self._ticks = TICKS_PER_FRAME * Fraction(fps).denominator
        self.init = self._encoder.init
        # RFC 6381: profile, constraints and level as avcC has them
        self.mime = f'video/mp4; codecs="avc1.{self._encoder.avcc[1:4].hex().upper()}"'

    def encode(self, frames: np.ndarray, *, start: int) -> Segment:
        """Make a segment of frames, uint8 [T, H, W, 3], the first of which is frame `start` of the video."""
        samples = self._encoder.encode(frames)
        return Segment(_fragment(samples, start=start, ticks=self._ticks), start, len(samples))

    def close(self) -> None:
        """Let the encoder go. Closing twice does nothing."""
        self._encoder.close()


def random_access(entries: Sequence[tuple[int, int]], *, ticks: int) -> bytes:
    """Return the box (mfra) by which a player finds segments. entries: first frame and offset in the file of each."""
    # each entry names the first run (1) of the first track fragment (1), and its first sample (1)
    times = b"".join(struct.pack(">QQ3B", start * ticks, offset, 1, 1, 1) for start, offset in entries)
    tfra = _full_box(b"tfra", 1, 0, struct.pack(">III", TRACK, 0, len(entries)) + times)
    mfro = _full_box(b"mfro", 0, 0, struct.pack(">I", 8 + len(tfra) + 16))
    return _box(b"mfra", tfra + mfro)


def boxes(data: bytes, begin: int = 0, end: int | None = None) -> Iterator[tuple[bytes, int, int]]:
    """Yield type, first byte of the content and byte behind it of each whole box."""
    end = len(data) if end is None else end
    while begin + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, begin)
        if size < 8 or begin + size > end:
            return
        yield kind, begin + 8, begin + size
        begin += size


def segment_times(data: bytes, begin: int, end: int) -> tuple[int, int]:
    """Return the start in ticks and the frames of a moof, whose content lies between two bytes of `data`."""
    inside = {kind: span for kind, *span in boxes(data, *_inside(data, begin, end, b"traf"))}
    (start,) = struct.unpack_from(">Q", data, inside[b"tfdt"][0] + 4)
    (frames,) = struct.unpack_from(">I", data, inside[b"trun"][0] + 4)
    return start, frames


def _inside(data: bytes, begin: int, end: int, *path: bytes) -> tuple[int, int]:
    for wanted in path:
        begin, end = next((first, last) for kind, first, last in boxes(data, begin, end) if kind == wanted)
    return begin, end


def _decoder_configuration(init: bytes) -> bytes:
    begin, end = _inside(init, 0, len(init), b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd")
    place = init.index(b"avcC", begin, end)
    (size,) = struct.unpack_from(">I", init, place - 4)
    return init[place + 4 : place - 4 + size]


def _fragment(samples: list[bytes], *, start: int, ticks: int) -> bytes:
    sizes = struct.pack(f">{len(samples)}I", *map(len, samples))
    tfhd = struct.pack(">III", TRACK, ticks, OTHER_FRAME)
    tfdt = struct.pack(">Q", start * ticks)

    def moof(data_offset: int) -> bytes:
        trun = struct.pack(">IiI", len(samples), data_offset, KEY_FRAME) + sizes
        traf = (
            _full_box(b"tfhd", 0, DEFAULT_BASE_IS_MOOF | DEFAULT_DURATION | DEFAULT_FLAGS, tfhd)
            + _full_box(b"tfdt", 1, 0, tfdt)
            + _full_box(b"trun", 0, DATA_OFFSET | FIRST_FLAGS | SAMPLE_SIZES, trun)
        )
        # numbers must rise: the frame does, and a segment that replaces another has the number of that one
        mfhd = _full_box(b"mfhd", 0, 0, struct.pack(">I", start + 1))
        return _box(b"moof", mfhd + _box(b"traf", traf))

    return moof(len(moof(0)) + 8) + _box(b"mdat", b"".join(samples))


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


def _full_box(kind: bytes, version: int, flags: int, content: bytes) -> bytes:
    return _box(kind, struct.pack(">I", version << 24 | flags) + content)


def _length_prefixed(annex_b: bytes) -> bytes:
    """Replace the start codes between NAL units by lengths; inside a unit no start code can occur."""
    units = [unit.rstrip(b"\x00") for unit in START_CODE.split(annex_b)[1:]]
    return b"".join(struct.pack(">I", len(unit)) + unit for unit in units)


def _yuv_picture(pixels_HWC: np.ndarray) -> VideoFrame:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels_HWC), format="rgb24")
    return picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
