"""Check a manifest and its videos before training: everything that is wrong, and what training would get."""

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
"""Relative: 23.98 passes for 24000/1001; 24 does not, for it would be a second off after 17 minutes."""
HEADER_FRAMES_TOLERANCE = 1
"""Frames by which manifest and header may differ; a count of all frames has to be met exactly."""


@dataclass(frozen=True)
class Problem:
    """What is wrong in, or behind, line `line` of the manifest."""

    line: int
    why: str


@dataclass(frozen=True)
class ManifestReport:
    """All problems, in the order of the lines, and what there is to train on.

    lines: all that are not blank. videos, seconds, shots: of those that training would use. clips: what it would get.
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
    """Check every line and every video. Raises UserError only when there is no manifest to read.

    num_chunks: of a clip; a video that gives none is a problem. decode: decode every frame, instead of reading what
    the header says and whether the file is whole. on_line: called with the number of lines done and of all lines.
    """
    chunks = chunks or ChunkFrames()
    lines = list(iterate_manifest(path))
    problems: list[Problem] = []
    good: list[tuple[int, VideoEntry]] = []
    for done, line in enumerate(lines, 1):
        found = [*line.problems, *_video_problems(line, decode=decode)]
        problems += [Problem(line.number, why) for why in found]
        if line.entry is not None and not found:
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
    """Compare a video with what its line says of it."""
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
        yield f"fps is {line.fps:g}, wanted {info.fps:.6g} as in {line.video}"
    tolerance = 0 if decode else HEADER_FRAMES_TOLERANCE
    if line.num_frames is not None and abs(line.num_frames - num_frames) > tolerance:
        yield f"num_frames is {line.num_frames}, wanted {num_frames} as in {line.video}"


def _length_problems(
    places: Sequence[FilePlace], num_chunks: int, *, has_clips: bool, fps: float, chunks: ChunkFrames
) -> Iterator[tuple[int, str]]:
    """Yield the number of a file in its sample, and why nothing of it is used."""
    wanted = chunks.start(num_chunks)
    for_clip = f"{wanted} for a clip of {num_chunks} chunk{'s' if num_chunks > 1 else ''}"
    if places[-1].end < wanted:
        got = f"{sum(frames_at(place.entry, fps) for place in places)} frames at {fps:g} a second"
        if len(places) > 1:
            got = f"the {len(places)} files of its sample give {places[-1].end} of their {got} as whole chunks"
        yield 0, f"too short: {got}, wanted {for_clip}"
        return
    for file, place in enumerate(places):
        if place.begin == place.end:
            frames, least = frames_at(place.entry, fps), chunks.later if place.begin else chunks.first
            yield file, f"too short: {frames} frames at {fps:g} a second, wanted {least} for one chunk of its sample"
    if not has_clips:
        yield 0, f"no clip: no {num_chunks} chunks in a row are covered by shots to at least a half"
