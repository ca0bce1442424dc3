"""Segments: boxes, key frames, increasing times, colors; the file of a stream after a seek and when it is reopened."""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from longvideo.errors import UserError
from longvideo.infer.fragments import TICKS_PER_FRAME, FragmentedVideo, Segment, VideoFormat, boxes, segment_times
from longvideo.infer.pipeline import StreamingPipeline
from longvideo.infer.server.media import StreamFile

WIDTH, HEIGHT, FPS = 96, 64, 24
PARTS = (1, 28, 32, 3)
STARTS = (0, 1, 29, 61)


def pictures(start: int, count: int) -> np.ndarray:
    """Return smooth colors with a bright column that moves by one pixel per frame."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    frames = np.stack([x * 2, y * 3, np.full_like(x, 90)], axis=-1).astype(np.uint8)[None].repeat(count, axis=0)
    for index in range(count):
        left = (start + index) % (WIDTH - 16)
        frames[index, 16:32, left : left + 16] = (220, 40, 30)
    return frames


def encoded(video: FragmentedVideo) -> list[Segment]:
    return [video.encode(pictures(start, count), start=start) for start, count in zip(STARTS, PARTS, strict=True)]


def decoded(data: bytes) -> tuple[list[int], np.ndarray]:
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
    time_base = frames[0].time_base
    assert time_base is not None
    indices = [round(float(frame.pts * time_base) * FPS) for frame in frames]
    return indices, np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


@pytest.fixture
def video() -> FragmentedVideo:
    return FragmentedVideo(VideoFormat(WIDTH, HEIGHT, Fraction(FPS)))


def test_init_and_segments_are_the_boxes_that_media_source_accepts(video: FragmentedVideo) -> None:
    assert [kind for kind, *_ in boxes(video.init)] == [b"ftyp", b"moov"]
    assert video.mime.startswith('video/mp4; codecs="avc1.42') and len(video.mime) == len(
        'video/mp4; codecs="avc1.42C00B"'
    )
    for segment, start, count in zip(encoded(video), STARTS, PARTS, strict=True):
        (moof, begin, end), (mdat, *_) = boxes(segment.data)
        assert (moof, mdat) == (b"moof", b"mdat")
        assert segment_times(segment.data, begin, end) == (start * TICKS_PER_FRAME, count)
        assert (segment.start, segment.frames) == (start, count)


def test_sequence_numbers_increase(video: FragmentedVideo) -> None:
    numbers = [struct.unpack_from(">I", segment.data, 8 + 8 + 4)[0] for segment in encoded(video)]
    assert all(later > earlier for earlier, later in pairwise(numbers))


def test_every_segment_plays_alone_from_its_key_frame(video: FragmentedVideo) -> None:
    for segment, start, count in zip(encoded(video), STARTS, PARTS, strict=True):
        data = video.init + segment.data
        with av.open(io.BytesIO(data)) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
        assert [packet.is_keyframe for packet in packets] == [True] + [False] * (count - 1)
        indices, frames = decoded(data)
        assert indices == list(range(start, start + count))
        assert np.abs(frames.astype(int) - pictures(start, count)).mean() < 4


def test_concatenated_segments_contain_every_frame_once(video: FragmentedVideo) -> None:
    indices, frames = decoded(video.init + b"".join(segment.data for segment in encoded(video)))
    assert indices == list(range(64))
    assert np.abs(frames.astype(int) - pictures(0, 64)).mean() < 4


def test_plain_colors_are_preserved(video: FragmentedVideo) -> None:
    for color in [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (120, 130, 90)]:
        frames = np.broadcast_to(np.array(color, dtype=np.uint8), (2, HEIGHT, WIDTH, 3))
        _, result = decoded(video.init + video.encode(frames, start=0).data)
        assert np.abs(result.astype(int) - frames).max() <= 4


def test_frames_of_tiny_are_preserved() -> None:
    pipeline = StreamingPipeline.from_pretrained("tiny", device="cpu")
    prompt = "a small red circle drifts left over a black background"
    expected = np.concatenate(list(pipeline.stream(prompt, seconds=1)))
    video = FragmentedVideo(VideoFormat(expected.shape[2], expected.shape[1], Fraction(FPS)))
    indices, frames = decoded(video.init + video.encode(expected, start=0).data)
    assert indices == list(range(24))
    assert np.abs(frames.astype(int) - expected).mean() < 1.5


def test_a_seek_replaces_segments_in_the_file(video: FragmentedVideo, tmp_path: Path) -> None:
    file = StreamFile(tmp_path / "a.mp4", video.init)
    for segment in encoded(video):
        file.append(segment)
    assert file.num_frames == 64
    file.append(video.encode(pictures(500, 32), start=29))
    indices, frames = decoded(file.path.read_bytes())
    assert indices == list(range(61)) and file.num_frames == 61
    assert np.abs(frames[29:].astype(int) - pictures(500, 32)).mean() < 4
    for start, count in ((0, 1), (1, 28)):
        file.append(video.encode(pictures(start, count), start=start))
    assert decoded(file.path.read_bytes())[0] == list(range(29))


def test_another_encoder_continues_a_file_with_an_incomplete_last_segment(
    video: FragmentedVideo, tmp_path: Path
) -> None:
    path = tmp_path / "a.mp4"
    file = StreamFile(path, video.init)
    for segment in encoded(video):
        file.append(segment)
    file.close()
    path.write_bytes(path.read_bytes()[:-10])
    other = FragmentedVideo(VideoFormat(WIDTH, HEIGHT, Fraction(FPS)))
    assert other.init == video.init
    reopened = StreamFile(path, other.init)
    assert reopened.num_frames == 61
    reopened.append(other.encode(pictures(61, 32), start=61))
    indices, frames = decoded(path.read_bytes())
    assert indices == list(range(93))
    assert np.abs(frames.astype(int) - pictures(0, 93)).mean() < 4


def test_a_file_with_another_initialization_segment_is_refused(video: FragmentedVideo, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"\x00\x00\x00\x10ftypabcd....")
    with pytest.raises(UserError, match="another version"):
        StreamFile(tmp_path / "a.mp4", video.init)
