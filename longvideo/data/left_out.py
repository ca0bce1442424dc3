"""Why videos and clips of a manifest are left out of training, in words; checking and encoding use the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from longvideo.data.clips import ClipSpec, SampleClips


def unused_files(sample: SampleClips, spec: ClipSpec) -> Iterator[tuple[int, str]]:
    """Yield the number of each file of a sample of which no part is used, and the reason.

    A reason that holds for the whole sample is that of its first file.
    """
    places = sample.places
    for_clip = f"{spec.num_frames} for a clip of {spec.num_chunks} chunk{'s' if spec.num_chunks > 1 else ''}"
    if places[-1].end < spec.num_frames:
        frames = f"{sum(spec.frames_of(place.video) for place in places)} frames at {spec.fps:g} a second"
        if len(places) > 1:
            frames = f"the {len(places)} files of its sample give {places[-1].end} of their {frames} as whole chunks"
        yield 0, f"too short: {frames}, expected {for_clip}"
        return
    for file, place in enumerate(places):
        if place.begin == place.end:
            frames, least = spec.frames_of(place.video), spec.chunks.later if place.begin else spec.chunks.first
            yield (
                file,
                f"too short: {frames} frames at {spec.fps:g} a second, expected {least} for one chunk of its sample",
            )
    if not sample.clips:
        yield 0, f"no clip: no {spec.num_chunks} chunks in a row are covered by shots to at least a half"


def clip_notices(samples: Sequence[SampleClips]) -> list[str]:
    """Return a sentence about clips that are left out of videos of which other clips are used, for users."""
    left_out = [sample.num_uncaptioned for sample in samples if sample.clips and sample.num_uncaptioned]
    if not left_out:
        return []
    clips = "1 clip is" if sum(left_out) == 1 else f"{sum(left_out)} clips are"
    return [f"{clips} left out, because shots cover less than half of a chunk ({_videos(len(left_out))})"]


def video_notices(samples: Sequence[SampleClips], spec: ClipSpec) -> list[str]:
    """Return a sentence about files of which no part is used, for users."""
    number = sum(
        len(sample.places) if not sample.clips else len(list(unused_files(sample, spec))) for sample in samples
    )
    if not number:
        return []
    command = f"`longvideo data validate --chunks {spec.num_chunks}` lists them"
    return [f"{_videos(number)} left out, too short or without captions; {command}"]


def _videos(number: int) -> str:
    return "1 video" if number == 1 else f"{number} videos"
