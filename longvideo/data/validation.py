"""Check a manifest and its videos before training: list all problems, and count the clips that training would get."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from longvideo.data.clips import ChunkFrames, FilePlace, frames_at, group_samples, lay_out, sample_clips
from longvideo.data.manifest import ManifestLine, VideoEntry, iterate_manifest
from longvideo.data.video import check_whole, count_frames, probe_video
from longvideo.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

FPS_TOLERANCE = 5e-4
"""Allowed relative error of fps: 23.98 is accepted for 24000/1001, but 24 is not (a second of error in 17 minutes)."""
HEADER_FRAMES_TOLERANCE = 1
"""Allowed difference in frames between manifest and header; a count of decoded frames must match exactly."""


@dataclass(frozen=True)
class Problem:
    """A problem with a line of the manifest or its video. line: from 1. why: the problem in words."""

    line: int
    why: str


@dataclass(frozen=True)
class ManifestReport:
    """The result of a check.

    problems: in the order of lines. lines: number of lines that are not blank. videos, seconds, shots: of the videos
    that training would use. clips: number of clips that training would get.
    """

    problems: tuple[Problem, ...]
    lines: int
    videos: int
    seconds: float
    shots: int
    clips: int


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
    chunks = chunks or ChunkFrames()
    lines = list(iterate_manifest(path))
    problems: list[Problem] = []
    good: list[tuple[int, VideoEntry]] = []
    for done, line in enumerate(lines, 1):
        own = [*line.problems, *_video_problems(line, decode=decode)]
        problems += [Problem(line.number, why) for why in own]
        if line.entry is not None and not own:
            good.append((line.number, line.entry))
        if on_line is not None:
            on_line(done, len(lines))
    numbers = iter([number for number, _ in good])
    num_clips = 0
    used: list[VideoEntry] = []
    for sample in group_samples(entry for _, entry in good):
        own_numbers = [next(numbers) for _ in sample]
        places = lay_out(sample, fps=fps, chunks=chunks)
        clips = sample_clips(places, num_chunks, fps=fps, chunks=chunks)
        num_clips += len(clips)
        used += [place.entry for place in places if clips and place.begin < place.end]
        too_short = _length_problems(places, num_chunks, has_clips=bool(clips), fps=fps, chunks=chunks)
        problems += [Problem(own_numbers[file], why) for file, why in too_short]
    return ManifestReport(
        problems=tuple(sorted(problems, key=lambda problem: problem.line)),
        lines=len(lines),
        videos=len(used),
        seconds=sum(entry.num_frames / entry.fps for entry in used),
        shots=sum(len(entry.shots) for entry in used),
        clips=num_clips,
    )


def _video_problems(line: ManifestLine, *, decode: bool) -> Iterator[str]:
    """Compare a video with its line of the manifest."""
    if line.video is None:
        return
    try:
        info = probe_video(line.video)
        check_whole(line.video)
        num_frames = count_frames(line.video) if decode else info.num_frames
    except UserError as error:
        yield str(error)
        return
    if line.fps is not None and abs(line.fps - info.fps) > FPS_TOLERANCE * info.fps:
        yield f"fps is {line.fps:g}, expected {info.fps:.6g} as in {line.video}"
    tolerance = 0 if decode else HEADER_FRAMES_TOLERANCE
    if line.num_frames is not None and abs(line.num_frames - num_frames) > tolerance:
        yield f"num_frames is {line.num_frames}, expected {num_frames} as in {line.video}"


def _length_problems(
    places: Sequence[FilePlace], num_chunks: int, *, has_clips: bool, fps: float, chunks: ChunkFrames
) -> Iterator[tuple[int, str]]:
    """Yield the number of a file in its sample, and the reason why no part of it is used."""
    expected = chunks.start(num_chunks)
    for_clip = f"{expected} for a clip of {num_chunks} chunk{'s' if num_chunks > 1 else ''}"
    if places[-1].end < expected:
        got = f"{sum(frames_at(place.entry, fps) for place in places)} frames at {fps:g} a second"
        if len(places) > 1:
            got = f"the {len(places)} files of its sample give {places[-1].end} of their {got} as whole chunks"
        yield 0, f"too short: {got}, expected {for_clip}"
        return
    for file, place in enumerate(places):
        if place.begin == place.end:
            frames, least = frames_at(place.entry, fps), chunks.later if place.begin else chunks.first
            yield file, f"too short: {frames} frames at {fps:g} a second, expected {least} for one chunk of its sample"
    if not has_clips:
        yield 0, f"no clip: no {num_chunks} chunks in a row are covered by shots to at least a half"
