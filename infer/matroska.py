"""Elements of a Matroska or WebM file that grows part by part: a header, a cluster for each part, an index at the end.

Elements: RFC 9559; their coding: RFC 8794 (EBML).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from longvideo.infer.fragments import BT709

if TYPE_CHECKING:
    from collections.abc import Sequence
    from fractions import Fraction

    from longvideo.infer.fragments import VideoFormat

TIMESTAMP_SCALE_NS = 1_000_000  # times are milliseconds
TRACK = 1
VIDEO_TRACK = 1
LIMITED_RANGE = 1
UNKNOWN_SIZE = b"\x01" + b"\xff" * 7
KEY_FRAME = 0x80
SEEK_HEAD_BYTES = 26
DURATION_BYTES = 11


class Id(IntEnum):
    """Identifiers of elements, by their names in RFC 9559."""

    EBML = 0x1A45DFA3
    DOC_TYPE = 0x4282
    DOC_TYPE_VERSION = 0x4287
    DOC_TYPE_READ_VERSION = 0x4285
    VOID = 0xEC
    SEGMENT = 0x18538067
    SEEK_HEAD = 0x114D9B74
    SEEK = 0x4DBB
    SEEK_ID = 0x53AB
    SEEK_POSITION = 0x53AC
    INFO = 0x1549A966
    TIMESTAMP_SCALE = 0x2AD7B1
    DURATION = 0x4489
    MUXING_APP = 0x4D80
    WRITING_APP = 0x5741
    TRACKS = 0x1654AE6B
    TRACK_ENTRY = 0xAE
    TRACK_NUMBER = 0xD7
    TRACK_UID = 0x73C5
    TRACK_TYPE = 0x83
    FLAG_LACING = 0x9C
    DEFAULT_DURATION = 0x23E383
    CODEC_ID = 0x86
    CODEC_PRIVATE = 0x63A2
    VIDEO = 0xE0
    PIXEL_WIDTH = 0xB0
    PIXEL_HEIGHT = 0xBA
    COLOUR = 0x55B0
    MATRIX_COEFFICIENTS = 0x55B1
    RANGE = 0x55B9
    TRANSFER_CHARACTERISTICS = 0x55BA
    PRIMARIES = 0x55BB
    CLUSTER = 0x1F43B675
    TIMESTAMP = 0xE7
    SIMPLE_BLOCK = 0xA3
    CUES = 0x1C53BB6B
    CUE_POINT = 0xBB
    CUE_TIME = 0xB3
    CUE_TRACK_POSITIONS = 0xB7
    CUE_TRACK = 0xF7
    CUE_CLUSTER_POSITION = 0xF1


@dataclass(frozen=True)
class Header:
    """The start of a file, with space for the length of the video and for the place of the index.

    data: its bytes. segment_begin: offset of the content of the segment. seek_head_offset: offset at which `seek_head`
    is written. duration_offset: offset at which `duration` is written.
    """

    data: bytes
    segment_begin: int
    seek_head_offset: int
    duration_offset: int


def header(video_format: VideoFormat, *, doc_type: bytes, codec: bytes, private: bytes) -> Header:
    """Return the bytes before the clusters.

    doc_type: b"matroska" or b"webm". codec: identifier of the codec. private: configuration of its decoder, may be
    empty.
    """
    color = (
        _unsigned(Id.MATRIX_COEFFICIENTS, BT709)
        + _unsigned(Id.RANGE, LIMITED_RANGE)
        + _unsigned(Id.TRANSFER_CHARACTERISTICS, BT709)
        + _unsigned(Id.PRIMARIES, BT709)
    )
    picture = (
        _unsigned(Id.PIXEL_WIDTH, video_format.width)
        + _unsigned(Id.PIXEL_HEIGHT, video_format.height)
        + _element(Id.COLOUR, color)
    )
    entry = (
        _unsigned(Id.TRACK_NUMBER, TRACK)
        + _unsigned(Id.TRACK_UID, TRACK)
        + _unsigned(Id.TRACK_TYPE, VIDEO_TRACK)
        + _unsigned(Id.FLAG_LACING, 0)
        + _unsigned(Id.DEFAULT_DURATION, round(10**9 / video_format.fps))
        + _element(Id.CODEC_ID, codec)
        + (_element(Id.CODEC_PRIVATE, private) if private else b"")
        + _element(Id.VIDEO, picture)
    )
    kind = _element(Id.DOC_TYPE, doc_type) + _unsigned(Id.DOC_TYPE_VERSION, 4) + _unsigned(Id.DOC_TYPE_READ_VERSION, 2)
    begin = _element(Id.EBML, kind) + _coded(Id.SEGMENT) + UNKNOWN_SIZE
    names = (
        _unsigned(Id.TIMESTAMP_SCALE, TIMESTAMP_SCALE_NS)
        + _element(Id.MUXING_APP, b"longvideo")
        + _element(Id.WRITING_APP, b"longvideo")
    )
    data = begin + _void(SEEK_HEAD_BYTES) + _element(Id.INFO, names + _void(DURATION_BYTES))
    tracks = _element(Id.TRACKS, _element(Id.TRACK_ENTRY, entry))
    return Header(data + tracks, len(begin), len(begin), len(data) - DURATION_BYTES)


def cluster(samples: Sequence[bytes], *, start: int, fps: Fraction) -> bytes:
    """Return a cluster of at most 32 s.

    samples: encoded frames, the first of which is a key frame. start: number of the first one in the video.
    """
    first = _milliseconds(start, fps)
    blocks = []
    for index, sample in enumerate(samples):
        offset, flags = _milliseconds(start + index, fps) - first, KEY_FRAME if index == 0 else 0
        blocks.append(_element(Id.SIMPLE_BLOCK, struct.pack(">BhB", 0x80 | TRACK, offset, flags) + sample))
    return _element(Id.CLUSTER, _unsigned(Id.TIMESTAMP, first) + b"".join(blocks))


def duration(num_frames: int, *, fps: Fraction) -> bytes:
    """Return the element with the length of the video, for `Header.duration_offset`."""
    return _element(Id.DURATION, struct.pack(">d", _milliseconds(num_frames, fps)))


def index(entries: Sequence[tuple[int, int]], *, fps: Fraction, segment_begin: int) -> bytes:
    """Return the index (Cues).

    entries: first frame of each cluster and its offset in the file. segment_begin: as in `Header`.
    """
    points = []
    for start, offset in entries:
        place = _unsigned(Id.CUE_TRACK, TRACK) + _unsigned(Id.CUE_CLUSTER_POSITION, offset - segment_begin)
        time = _unsigned(Id.CUE_TIME, _milliseconds(start, fps))
        points.append(time + _element(Id.CUE_TRACK_POSITIONS, place))
    return _element(Id.CUES, b"".join(_element(Id.CUE_POINT, point) for point in points))


def seek_head(offset: int, *, segment_begin: int) -> bytes:
    """Return the element with the place of the index, for `Header.seek_head_offset`. offset: offset of the index."""
    place = struct.pack(">Q", offset - segment_begin)
    return _element(
        Id.SEEK_HEAD, _element(Id.SEEK, _element(Id.SEEK_ID, _coded(Id.CUES)) + _element(Id.SEEK_POSITION, place))
    )


def segment_size(size: int) -> bytes:
    """Return the size of the segment, for the 8 bytes before `Header.segment_begin`."""
    return (size | 1 << 7 * len(UNKNOWN_SIZE)).to_bytes(len(UNKNOWN_SIZE), "big")


def _milliseconds(frame: int, fps: Fraction) -> int:
    return round(1000 * frame / fps)


def _element(identifier: int, content: bytes) -> bytes:
    return _coded(identifier) + _size(len(content)) + content


def _unsigned(identifier: int, value: int) -> bytes:
    return _element(identifier, value.to_bytes(max(1, (value.bit_length() + 7) // 8), "big"))


def _void(total: int) -> bytes:
    return _coded(Id.VOID) + _size(total - 2) + bytes(total - 2)


def _coded(identifier: int) -> bytes:
    return identifier.to_bytes((identifier.bit_length() + 7) // 8, "big")


def _size(value: int) -> bytes:
    """Return a size in the fewest bytes that can hold it. A size whose bits are all ones would mean "unknown"."""
    length = next(length for length in range(1, 9) if value < (1 << 7 * length) - 1)
    return (value | 1 << 7 * length).to_bytes(length, "big")
