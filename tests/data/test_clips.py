"""Clips of a ShapeWorld data set keep their cuts on chunk boundaries and show the scenes of their captions."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longvideo.cli.main import main
from longvideo.data.clips import ClipSpec, Footage, group_samples, iterate_clips, plan_clips, read_clip
from longvideo.data.manifest import ShotEntry, VideoEntry, read_manifest
from longvideo.data.timing import measure
from longvideo.data.video import VideoReader
from longvideo.errors import UserError
from longvideo.model.chunk_frames import WAN_CHUNKS, ChunkFrames

from . import footage

SIZE = (64, 112)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "shapes"
    code = main(
        ["data", "shapeworld", "--out", str(out), "--clips", "2", "--seconds", "7", "--shots", "3"]
        + ["--height", "64", "--width", "112", "--seed", "40"]
    )
    assert code == 0
    return out


def test_clips_keep_cuts_on_chunk_boundaries(folder: Path) -> None:
    entries = read_manifest(folder / "manifest.jsonl")
    references = plan_clips(entries, ClipSpec(2))
    assert [round(reference.start_seconds * 24) for reference in references] == [0, 64, 128] * 2
    for video in measure(entries):
        for first_chunk, reference in zip((0, 2, 4), [r for r in references if r.video == video.video], strict=True):
            for i in range(2):
                middle = (WAN_CHUNKS.start(first_chunk + i) + 16) / 24
                (shot,) = [shot for shot in video.shots if shot.start <= middle < shot.end]
                assert reference.captions[i] == shot.caption
            assert reference.cuts[0]
            assert reference.cuts[1] == (reference.captions[0] != reference.captions[1])
    clips = list(iterate_clips(references, size=SIZE))
    assert all(clip.frames.shape == (61, *SIZE, 3) for clip in clips)
    assert torch.equal(clips[1].frames, VideoReader().read(entries[0].video)[64:125])


def test_chunks_without_a_shot_are_left_out(tmp_path: Path) -> None:
    entry = VideoEntry(tmp_path / "a.mp4", 24.0, 300, (ShotEntry(0, 61, "one"), ShotEntry(130, 300, "two")))
    references = plan_clips([entry], ClipSpec(1))
    assert [round(r.start_seconds * 24) for r in references] == [0, 32, 128, 160, 192, 224, 256]
    assert [r.captions[0] for r in references] == ["one"] * 2 + ["two"] * 5
    with pytest.raises(UserError, match="none of the 1 videos has 13.21 s with captions"):
        plan_clips([entry], ClipSpec(10))


def test_other_chunk_sizes_and_rates(tmp_path: Path) -> None:
    entry = VideoEntry(tmp_path / "a.mp4", 48.0, 130, (ShotEntry(0, 130, "one"),))
    references = plan_clips([entry], ClipSpec(2, chunks=ChunkFrames(13, 16)))
    assert [r.start_seconds * 24 for r in references] == [0, 32]


def test_clips_of_a_sample_continue_in_the_next_file(tmp_path: Path) -> None:
    # 61 whole frames of 70, all 64 of 64, none of 20, 32 of 50 (25 frames per second, 48 at 24)
    entries = [
        replace(footage.write(tmp_path / f"{i}.mp4", count, fps=fps, brightness=40 * i + 40), sample="walk")
        for i, (count, fps) in enumerate(((70, 24), (64, 24), (20, 24), (50, 25)))
    ]
    references = plan_clips(entries, ClipSpec(3))
    alone = plan_clips([replace(entry, sample=None) for entry in entries], ClipSpec(2))
    assert [len(reference.footage) for reference in alone] == [1, 1]
    assert [reference.captions for reference in references] == [("SQUARE 40", "SQUARE 40", "SQUARE 80")]
    assert references[0].cuts == (True, False, True)
    files = [entry.video for entry in entries]
    assert references[0].footage == (Footage(files[0], 0.0, 61), Footage(files[1], 0.0, 32))
    clip = read_clip(references[0], size=SIZE)
    assert torch.equal(clip.frames[:61], VideoReader(size=SIZE).read(files[0])[:61])
    assert torch.equal(clip.frames[61:], VideoReader(size=SIZE).read(files[1])[:32])
    short = plan_clips(entries, ClipSpec(1))
    assert [reference.captions[0] for reference in short] == ["SQUARE 40"] * 2 + ["SQUARE 80"] * 2 + ["SQUARE 160"]
    # clips begin at multiples of 32 frames, files after the first at 29 + 32 k
    assert [round(reference.start_seconds * 24) for reference in short] == [0, 32, 3, 35, 3]
    assert torch.equal(read_clip(short[4], size=SIZE).frames, VideoReader(24, size=SIZE).read(files[3])[3:32])


def test_other_videos_end_a_sample(tmp_path: Path) -> None:
    shots = (ShotEntry(0, 61, "one"),)
    entries = [VideoEntry(tmp_path / f"{i}.mp4", 24.0, 61, shots, name) for i, name in enumerate(["a", None, "b", "b"])]
    assert [len(sample) for sample in group_samples(measure(entries))] == [1, 1, 2]
    references = plan_clips(entries, ClipSpec(2))
    assert [(len(r.footage), r.cuts[1]) for r in references] == [(1, False)] * 3
    assert [len(r.footage) for r in plan_clips(entries, ClipSpec(3))] == [2]


def test_a_manifest_that_promises_too_much_is_named(folder: Path) -> None:
    entry = read_manifest(folder / "manifest.jsonl")[0]
    longer = VideoEntry(entry.video, 24.0, 400, (ShotEntry(0, 400, "one"),))
    with pytest.raises(UserError, match=r"num_frames is 400, expected 189 as in .*0.mp4; correct its line"):
        plan_clips([longer], ClipSpec(2))
    (reference, *_) = plan_clips([entry], ClipSpec(2))
    beyond = replace(reference, footage=(replace(reference.footage[0], start_seconds=7.0),))
    with pytest.raises(UserError, match=r"has 21 frames after 7.00 s, expected 61; repair"):
        read_clip(beyond, size=SIZE)
