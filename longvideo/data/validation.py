"""Check a manifest and its videos before training: list all problems, and count the clips that training would get."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from longvideo.data.clips import SampleClips, group_samples, sample_clips
from longvideo.data.container import COPY_AGAIN
from longvideo.data.left_out import clip_notices, unused_files
from longvideo.data.manifest import iterate_manifest
from longvideo.data.timing import (
    FRAMES_TOLERANCE,
    TimedVideo,
    differences,
    notices,
    shot_differences,
    time_entry,
)
from longvideo.data.video import VideoInfo, check_complete, count_frames, probe_video
from longvideo.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from longvideo.data.clips import ClipSpec


@dataclass(frozen=True)
class Problem:
    """A problem with a line of the manifest or its video. line: from 1. why: the problem in words."""

    line: int
    why: str


@dataclass(frozen=True)
class ManifestReport:
    """The result of a check.

    problems: in the order of lines. lines: number of videos in the manifest. videos, seconds, shots: of the videos that
    training would use. clips: number of clips that training would get. notices: what is converted in
    these videos, and which clips are left out.
    """

    problems: tuple[Problem, ...]
    lines: int
    videos: int
    seconds: float
    shots: int
    clips: int
    notices: tuple[str, ...]


def validate_manifest(
    path: Path,
    spec: ClipSpec,
    *,
    decode: bool = False,
    on_line: Callable[[int, int], None] | None = None,
) -> ManifestReport:
    """Check every line and every video. Raises UserError only if the manifest cannot be read.

    A video without a clip is a problem. decode: decode every frame, instead of reading the header and checking that the
    file is complete. on_line: called with the number of finished lines and of all lines.
    """
    lines = list(iterate_manifest(path))
    problems: list[Problem] = []
    good: list[tuple[int, TimedVideo]] = []
    for done, line in enumerate(lines, 1):
        own, info = list(line.problems), None
        if line.video is not None:
            try:
                info = _checked(line.video, decode=decode)
                own += differences(line.video, info, fps=line.fps, num_frames=line.num_frames)
                own += shot_differences(line.entry, info) if line.entry is not None else []
            except UserError as error:
                own.append(str(error))
        problems += [Problem(line.number, why) for why in own]
        if line.entry is not None and info is not None and not own:
            good.append((line.number, time_entry(line.entry, info)))
        if on_line is not None:
            on_line(done, len(lines))
    numbers = iter([number for number, _ in good])
    samples: list[SampleClips] = []
    used: list[TimedVideo] = []
    for videos in group_samples(video for _, video in good):
        own_numbers = [next(numbers) for _ in videos]
        sample = sample_clips(videos, spec)
        samples.append(sample)
        used += [place.video for place in sample.places if sample.clips and place.begin < place.end]
        problems += [Problem(own_numbers[file], why) for file, why in unused_files(sample, spec)]
    return ManifestReport(
        problems=tuple(sorted(problems, key=lambda problem: problem.line)),
        lines=len(lines),
        videos=len(used),
        seconds=sum(video.seconds for video in used),
        shots=sum(len(video.shots) for video in used),
        clips=sum(len(sample.clips) for sample in samples),
        notices=(*notices(used), *clip_notices(samples)),
    )


def _checked(path: Path, *, decode: bool) -> VideoInfo:
    """Probe a video. Raises UserError if it cannot be read as a whole. decode: decode every frame to find damage."""
    info = probe_video(path)
    check_complete(path)
    if decode and (count := count_frames(path)) < info.num_frames - FRAMES_TOLERANCE:
        raise UserError(f"{path} is damaged: {count} of {info.num_frames} frames can be decoded; {COPY_AGAIN}")
    return info
