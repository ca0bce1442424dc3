"""Encode H.264 and fragmented MP4 part by part: every part is a segment that starts with a key frame.

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
BT709 = 1  # ISO/IEC 23091-2: the code of the primaries, of the transfer function and of the matrix
LONGEST_PART = 10_000  # frames after which the encoder inserts a key frame by itself; no part has as many

DEFAULT_BASE_IS_MOOF, DEFAULT_DURATION, DEFAULT_FLAGS = 0x020000, 0x08, 0x20  # of tfhd
DATA_OFFSET, FIRST_FLAGS, SAMPLE_SIZES = 0x01, 0x04, 0x200  # of trun
KEY_FRAME, OTHER_FRAME = 0x02000000, 0x01010000  # of samples: depends on no other; depends on others, no sync sample
START_CODE = re.compile(b"\x00\x00\x00?\x01")


@dataclass(frozen=True)
class VideoFormat:
    """Size, rate and quality of a video.

    width, height: pixels, both even for H.264 and VP9. fps: frames per second. crf: quality in H.264's scale, 0 to 51;
    lower values give better pictures and larger files. profile: profile of H.264.
    """

    width: int
    height: int
    fps: Fraction
    crf: int = CRF
    profile: str = "baseline"


@dataclass(frozen=True)
class Segment:
    """A media segment (moof and mdat). start: number of its first frame in the video. frames: number of its frames."""

    data: bytes
    start: int
    frames: int


class PartEncoder:
    """Encodes parts of a video in H.264. Each part starts with a key frame, and no frame waits for the next part.

    init: ftyp and moov of a fragmented MP4. avcc: configuration of the decoder (avcC), as MP4 and Matroska store it.
    """

    def __init__(self, video_format: VideoFormat) -> None:
        """Open an encoder."""
        import av

        memory = io.BytesIO()
        timescale = str(video_format.fps.numerator * TICKS_PER_FRAME)
        options = {"movflags": "empty_moov+default_base_moof", "video_track_timescale": timescale}
        self._container = av.open(memory, "w", format="mp4", options=options)
        encoder_options = {
            "profile": video_format.profile,
            "preset": "veryfast",
            "tune": "zerolatency",
            "crf": str(video_format.crf),
            "g": str(LONGEST_PART),
            "sc_threshold": "0",
            "forced-idr": "1",
        }
        self._stream = self._container.add_stream("libx264", rate=video_format.fps, options=encoder_options)
        self._stream.width, self._stream.height = video_format.width, video_format.height
        self._stream.pix_fmt = "yuv420p"
        codec: Any = self._stream.codec_context
        codec.thread_count = 1  # more threads would slice the frame, which costs bits, and slow the model down
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        codec.color_range = 1  # limited range
        self._container.start_encoding()
        self._fps = video_format.fps
        self._encoded = 0
        self.init = memory.getvalue()
        self.avcc = _decoder_configuration(self.init)

    def encode(self, frames: np.ndarray) -> list[bytes]:
        """Encode a part.

        frames: uint8 [T, H, W, 3]. Returns a sample for each frame: its NAL units, each preceded by its length.
        """
        from av.video.frame import PictureType

        samples = []
        for offset, pixels in enumerate(frames):
            picture = yuv_picture(pixels)
            # a clock of its own: that of the video goes back at a seek, which x264 does not accept
            picture.pts, picture.time_base = self._encoded, 1 / self._fps
            picture.pict_type = PictureType.I if offset == 0 else PictureType.NONE
            packets = self._stream.encode(picture)
            assert len(packets) == 1, "the encoder delayed a frame"
            samples.append(_length_prefixed(bytes(packets[0])))
            self._encoded += 1
        return samples

    def close(self) -> None:
        """Free the encoder. Closing twice does nothing."""
        self._container.close()


class FragmentedVideo:
    """Encodes parts of one video as segments of fragmented MP4.

    init: initialization segment (ftyp and moov), the same for equal sizes. mime: type for a browser's MediaSource.
    """

    def __init__(self, video_format: VideoFormat) -> None:
        """Open an encoder."""
        self._encoder = PartEncoder(video_format)
        self._ticks = TICKS_PER_FRAME * video_format.fps.denominator
        self.init = self._encoder.init
        # RFC 6381: profile, constraints and level as avcC has them
        self.mime = f'video/mp4; codecs="avc1.{self._encoder.avcc[1:4].hex().upper()}"'

    def encode(self, frames: np.ndarray, *, start: int) -> Segment:
        """Return a segment. frames: uint8 [T, H, W, 3]. start: number of the first one in the video."""
        samples = self._encoder.encode(frames)
        return Segment(_fragment(samples, start=start, ticks=self._ticks), start, len(samples))

    def close(self) -> None:
        """Free the encoder. Closing twice does nothing."""
        self._encoder.close()


def random_access(entries: Sequence[tuple[int, int]], *, ticks: int) -> bytes:
    """Return the index of a file (box mfra).

    entries: first frame of each segment and its offset in the file. ticks: length of a frame in units of time.
    """
    # each entry names the first run (1) of the first track fragment (1), and its first sample (1)
    times = b"".join(struct.pack(">QQ3B", start * ticks, offset, 1, 1, 1) for start, offset in entries)
    tfra = _full_box(b"tfra", 1, 0, struct.pack(">III", TRACK, 0, len(entries)) + times)
    mfro = _full_box(b"mfro", 0, 0, struct.pack(">I", 8 + len(tfra) + 16))
    return _box(b"mfra", tfra + mfro)


def boxes(data: bytes, begin: int = 0, end: int | None = None) -> Iterator[tuple[bytes, int, int]]:
    """Yield the type of each complete box, and the bounds of its content: the first byte, and the byte after it."""
    end = len(data) if end is None else end
    while begin + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, begin)
        if size < 8 or begin + size > end:
            return
        yield kind, begin + 8, begin + size
        begin += size


def segment_times(data: bytes, begin: int, end: int) -> tuple[int, int]:
    """Return the start of a segment in ticks, and its number of frames. begin, end: bounds of the content of moof."""
    inside = {kind: span for kind, *span in boxes(data, *_inside(data, begin, end, b"traf"))}
    (start,) = struct.unpack_from(">Q", data, inside[b"tfdt"][0] + 4)
    (frames,) = struct.unpack_from(">I", data, inside[b"trun"][0] + 4)
    return start, frames


def yuv_picture(pixels_HWC: np.ndarray) -> VideoFrame:
    """Return a picture for an encoder, in BT.709 with 4:2:0 color and limited range. pixels: uint8."""
    import av
    from av.video.reformatter import ColorRange, Colorspace

    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels_HWC), format="rgb24")
    return picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)


def _inside(data: bytes, begin: int, end: int, *path: bytes) -> tuple[int, int]:
    """Return the bounds of the content of a box. path: types of the boxes that contain it, then its own type."""
    for name in path:
        begin, end = next((first, last) for kind, first, last in boxes(data, begin, end) if kind == name)
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
        # numbers must increase, as frame numbers do; a segment that replaces another has the same number
        mfhd = _full_box(b"mfhd", 0, 0, struct.pack(">I", start + 1))
        return _box(b"moof", mfhd + _box(b"traf", traf))

    return moof(len(moof(0)) + 8) + _box(b"mdat", b"".join(samples))


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


def _full_box(kind: bytes, version: int, flags: int, content: bytes) -> bytes:
    return _box(kind, struct.pack(">I", version << 24 | flags) + content)


def _length_prefixed(annex_b: bytes) -> bytes:
    """Replace the start codes between NAL units by lengths. A start code cannot occur inside a unit."""
    units = [unit.rstrip(b"\x00") for unit in START_CODE.split(annex_b)[1:]]
    return b"".join(struct.pack(">I", len(unit)) + unit for unit in units)
