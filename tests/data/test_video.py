"""Frames are read as they were written; rate and size change without stretching; damage is a clear error."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longvideo.data.video import VideoReader, probe_video, write_video
from longvideo.errors import UserError
from longvideo.files import WriteError
from tests.files.test_writing import no_file_longer_than


def disc(height: int, width: int, radius: float) -> Tensor:
    """A white disc in the middle of black: uint8 [H, W, 3]."""
    y = torch.arange(height)[:, None] + 0.5 - height / 2
    x = torch.arange(width) + 0.5 - width / 2
    return ((x * x + y * y < radius * radius) * 255).to(torch.uint8)[..., None].expand(-1, -1, 3).contiguous()


def numbered(count: int) -> Tensor:
    """Frames whose brightness is 5 times their number: uint8 [T, 32, 48, 3]."""
    return (torch.arange(count) * 5).to(torch.uint8)[:, None, None, None].expand(-1, 32, 48, 3).contiguous()


def numbers(frames: Tensor) -> list[int]:
    return (frames.float().mean((1, 2, 3)) / 5).round().int().tolist()


def assert_round(picture_HW3: Tensor) -> None:
    bright = picture_HW3[..., 0] > 127
    height, width = int(bright.any(1).sum()), int(bright.any(0).sum())
    assert abs(height - width) <= 1 and height > 10


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "numbered.mp4"
    assert write_video(path, [numbered(50)[:29], numbered(50)[29:]], fps=25) == 50
    return path


@pytest.mark.parametrize("longest", [10, 700, 3000])
def test_a_full_disk_while_a_video_is_written_is_one_line_and_keeps_nothing(longest: int, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    noise = torch.randint(256, (50, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with no_file_longer_than(longest), pytest.raises(WriteError) as caught:
        write_video(path, [noise], fps=25)
    assert str(caught.value) == f"cannot write {path}: file too large; no part of it remains"
    assert list(tmp_path.iterdir()) == []


def test_a_written_video_reads_back(video: Path) -> None:
    frames = VideoReader().read(video)
    assert frames.shape == (50, 32, 48, 3) and frames.dtype == torch.uint8
    assert numbers(frames) == list(range(50))
    assert (frames.int() - numbered(50).int()).abs().max() <= 2
    info = probe_video(video)
    assert (info.height, info.width, info.fps) == (32, 48, 25.0)
    assert info.seconds == pytest.approx(2.0)


def test_resampling_takes_the_nearest_frame(video: Path) -> None:
    assert numbers(VideoReader(24).read(video)) == [math.floor(i * 25 / 24 + 0.5) for i in range(48)]
    assert numbers(VideoReader(12.5).read(video)) == list(range(0, 50, 2))
    doubled = numbers(VideoReader(50).read(video))
    assert len(doubled) == 99 and sorted(doubled) == doubled and set(doubled) == set(range(50))


def test_reading_may_start_anywhere_and_stop(video: Path) -> None:
    assert numbers(VideoReader().read(video, start_seconds=1.0)) == list(range(25, 50))
    assert numbers(VideoReader(25).read(video, start_seconds=0.4, max_frames=3)) == [10, 11, 12]
    whole = VideoReader(24).read(video)
    assert torch.equal(VideoReader(24).read(video, start_seconds=20 / 24, max_frames=5), whole[20:25])
    assert len(list(VideoReader().frames(video, max_frames=0))) == 0
    with pytest.raises(UserError, match="no frame at 9 s"):
        VideoReader().read(video, start_seconds=9)


@pytest.mark.parametrize("size", [(32, 56), (64, 64), (96, 56), (128, 224), (48, 200)])
def test_any_size_is_cropped_never_stretched(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "disc.mp4"
    write_video(path, [disc(96, 160, 22).expand(2, -1, -1, -1)], fps=24)
    frames = VideoReader(size=size).read(path)
    assert frames.shape == (2, *size, 3)
    scale = max(size[0] / 96, size[1] / 160)
    if 44 * scale < min(size):
        assert_round(frames[0])
        expected = int((disc(96, 160, 22)[..., 0] > 0).sum()) * scale**2
        assert int((frames[0, ..., 0] > 127).sum()) == pytest.approx(expected, rel=0.1)


def test_colors_survive(tmp_path: Path) -> None:
    colors = torch.tensor([[224, 32, 38], [34, 190, 66], [30, 90, 245], [255, 226, 40]], dtype=torch.uint8)
    frames = colors[:, None, None].expand(-1, 32, 32, 3).contiguous()
    for pixel_format in ("yuv420p", "yuv444p"):
        write_video(tmp_path / "c.mp4", [frames], fps=24, pixel_format=pixel_format)
        assert (VideoReader().read(tmp_path / "c.mp4").int() - frames.int()).abs().max() <= 5


def test_files_that_are_no_video_are_named(tmp_path: Path, video: Path) -> None:
    with pytest.raises(UserError, match="there is no video .*none.mp4"):
        VideoReader().read(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("hello " * 100)
    with pytest.raises(UserError, match="text.mp4 is not a video"):
        VideoReader().read(tmp_path / "text.mp4")
    (tmp_path / "short.mp4").write_bytes(video.read_bytes()[:400])
    with pytest.raises(UserError, match="short.mp4 is not a video"):
        probe_video(tmp_path / "short.mp4")


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "kept.mp4"
    path.write_bytes(b"old")
    with pytest.raises(UserError, match="31x48; yuv420p needs even sizes"):
        write_video(path, [numbered(2)[:, :31]], fps=24)
    with pytest.raises(UserError, match="no frames to write"):
        write_video(path, [], fps=24)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
