"""Check a manifest and its videos before training: list all problems, and count the clips that training would get."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from longvideo.data.clips import ChunkFrames, ClipSpec, FilePlace, group_samples, lay_out, sample_clips
from longvideo.data.container import COPY_AGAIN
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
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path


@dataclass(frozen=True)
class Problem:
    """A problem with a line of the manifest or its video. line: from 1. why: the problem in words."""

    line: int
    why: str


@dataclass(frozen=True)
class ManifestReport:
    """The result of a check.

    problems: in the order of lines. lines: number of videos in the manifest. videos, seconds, shots: of the videos that
    training would use. clips: number of clips that training would get. notices: what is converted in these videos.
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
    *,
    num_chunks: int = 1,
    decode: bool = False,
    fps: float = 24.0,
    chunks: ChunkFrames | None = None,
    on_line: Callable[[int, int], None] | None = None,
) -> ManifestReport:
    """Check every line and every video. Raises UserError only if the manifest cannot be read.

    num_chunks: chunks of a clip; a video without a clip of this length is a problem. decode: decode every frame,
    instead of reading the header and checking that the file is complete. on_line: called with the number of finished
    lines and of all lines.
    """
    spec = ClipSpec(num_chunks, fps, chunks or ChunkFrames())
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
    num_clips = 0
    used: list[TimedVideo] = []
    for sample in group_samples(video for _, video in good):
        own_numbers = [next(numbers) for _ in sample]
        places = lay_out(sample, spec)
        clips = sample_clips(places, spec)
        num_clips += len(clips)
        used += [place.video for place in places if clips and place.begin < place.end]
        too_short = _length_problems(places, spec, has_clips=bool(clips))
        problems += [Problem(own_numbers[file], why) for file, why in too_short]
    return ManifestReport(
        problems=tuple(sorted(problems, key=lambda problem: problem.line)),
        lines=len(lines),
        videos=len(used),
        seconds=sum(video.seconds for video in used),
        shots=sum(len(video.shots) for video in used),
        clips=num_clips,
        notices=tuple(notices(used)),
    )


def _checked(path: Path, *, decode: bool) -> VideoInfo:
    """Probe a video. Raises UserError if it cannot be read as a whole. decode: decode every frame to find damage."""
    info = probe_video(path)
    check_complete(path)
    if decode and (count := count_frames(path)) < info.num_frames - FRAMES_TOLERANCE:
        raise UserError(f"{path} is damaged: {count} of {info.num_frames} frames can be decoded; {COPY_AGAIN}")
    return info


def _length_problems(places: Sequence[FilePlace], spec: ClipSpec, *, has_clips: bool) -> Iterator[tuple[int, str]]:
    """Yield the number of a file in its sample, and the reason why no part of it is used."""
    for_clip = f"{spec.num_frames} for a clip of {spec.num_chunks} chunk{'s' if spec.num_chunks > 1 else ''}"
    if places[-1].end < spec.num_frames:
        got = f"{sum(spec.frames_of(place.video) for place in places)} frames at {spec.fps:g} a second"
        if len(places) > 1:
            got = f"the {len(places)} files of its sample give {places[-1].end} of their {got} as whole chunks"
        yield 0, f"too short: {got}, expected {for_clip}"
        return
    for file, place in enumerate(places):
        if place.begin == place.end:
            frames, least = spec.frames_of(place.video), spec.chunks.later if place.begin else spec.chunks.first
            yield (
                file,
                f"too short: {frames} frames at {spec.fps:g} a second, expected {least} for one chunk of its sample",
            )
    if not has_clips:
        yield 0, f"no clip: no {spec.num_chunks} chunks in a row are covered by shots to at least a half"
