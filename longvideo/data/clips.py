"""Training clips from a manifest: sequences of whole chunks, each chunk with the caption of its shot.

A clip of G chunks has 29 + 32 (G - 1) pixel frames at the model's frame rate. Clips begin at multiples of 32 frames, so
the chunk boundaries of a clip, 29 + 32 k frames after its first frame, are chunk boundaries of the whole video, and
cuts on chunk boundaries stay there.

The files of a sample form one video. Only whole chunks of each file are used, and the remaining frames at its end are
dropped, so the cuts between files are on chunk boundaries for files of any length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.data.timeline import frames_until
from longvideo.data.timing import TimedVideo, measure
from longvideo.data.video import VideoReader
from longvideo.errors import UserError
from longvideo.model.chunk_frames import WAN_CHUNKS, ChunkFrames

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from longvideo.checkpoint.settings import ModelSettings
    from longvideo.data.manifest import VideoEntry


@dataclass(frozen=True)
class ClipSpec:
    """How clips are cut from videos.

    num_chunks: chunks of a clip. fps: frames per second at which videos are read. chunks: pixel frames of each chunk.
    """

    num_chunks: int
    fps: float = 24.0
    chunks: ChunkFrames = WAN_CHUNKS

    @classmethod
    def of_model(cls, num_chunks: int, settings: ModelSettings, temporal_scale: int) -> ClipSpec:
        """Return the clips of a model. temporal_scale: pixel frames for each latent frame."""
        return cls(num_chunks, settings.fps, ChunkFrames.of_latents(settings.chunk_frames, temporal_scale))

    @property
    def num_frames(self) -> int:
        """Pixel frames of a clip."""
        return self.chunks.start(self.num_chunks)

    def frames_of(self, video: TimedVideo) -> int:
        """Return the number of frames that are read from a whole video."""
        return frames_until(video.read_end, self.fps)


@dataclass(frozen=True)
class Footage:
    """A stretch of one file: `num_frames` frames at the clip's frame rate, from `start_seconds` on."""

    video: Path
    start_seconds: float
    num_frames: int


@dataclass(frozen=True)
class ClipReference:
    """The place of a clip in its video files, small enough to shuffle and distribute millions of them.

    footage: stretches in the order of time; several if a clip continues in the next file of its sample. captions: one
    for each chunk. cuts: for each chunk, whether it begins a shot. fps: frames per second of the clip.
    """

    footage: tuple[Footage, ...]
    captions: tuple[str, ...]
    cuts: tuple[bool, ...]
    fps: float

    @property
    def video(self) -> Path:
        """File of the first frame."""
        return self.footage[0].video

    @property
    def start_seconds(self) -> float:
        """Time of the first frame in its file."""
        return self.footage[0].start_seconds


@dataclass(frozen=True)
class Clip:
    """A clip in memory. frames: uint8 [T, H, W, 3]. captions, cuts: as in `ClipReference`."""

    frames: Tensor
    captions: tuple[str, ...]
    cuts: tuple[bool, ...]


@dataclass(frozen=True)
class FilePlace:
    """The frames [begin, end) of a sample, at the model's frame rate, that one file provides; empty if too short."""

    video: TimedVideo
    begin: int
    end: int


@dataclass(frozen=True)
class SampleClips:
    """The clips of one sample. num_uncaptioned: clips that are left out, because shots cover too little of a chunk."""

    places: tuple[FilePlace, ...]
    clips: tuple[ClipReference, ...]
    num_uncaptioned: int


def plan_clips(entries: Sequence[VideoEntry], spec: ClipSpec) -> list[ClipReference]:
    """Return the clips in all videos, in order and without overlap.

    Opens every video for the times of its frames. A chunk gets the caption of the shot that covers most of it. A clip
    is left out if no shot covers at least half of one of its chunks. Raises UserError if no video is long enough, and
    for a line of the manifest that does not fit its file.
    """
    return [clip for sample in clips_of(measure(entries), spec) for clip in sample.clips]


def clips_of(videos: Sequence[TimedVideo], spec: ClipSpec) -> list[SampleClips]:
    """Return the clips of each sample of measured videos. Raises UserError if there is no clip; see `plan_clips`."""
    samples = [sample_clips(sample, spec) for sample in group_samples(videos)]
    if not any(sample.clips for sample in samples):
        raise UserError(
            f"none of the {len(videos)} videos has {spec.num_frames / spec.fps:.2f} s with captions, the length of"
            f" {spec.num_chunks} chunks; use fewer chunks"
        )
    return samples


def group_samples(videos: Iterable[TimedVideo]) -> list[tuple[TimedVideo, ...]]:
    """Group the videos of each sample; a video without a sample forms its own group."""
    named = ((video.sample or number, video) for number, video in enumerate(videos))
    return [tuple(video for _, video in group) for _, group in groupby(named, lambda pair: pair[0])]


def sample_clips(sample: Sequence[TimedVideo], spec: ClipSpec) -> SampleClips:
    """Return the clips of the files of one sample; see `plan_clips`."""
    places = _lay_out(sample, spec)
    begins = range(0, places[-1].end - spec.num_frames + 1, spec.num_chunks * spec.chunks.later)
    references = [_reference(places, begin, spec) for begin in begins]
    clips = tuple(reference for reference in references if reference is not None)
    return SampleClips(tuple(places), clips, len(references) - len(clips))


def _lay_out(sample: Sequence[TimedVideo], spec: ClipSpec) -> list[FilePlace]:
    """Return the frames of a sample that each of its files provides, in whole chunks and one file after another."""
    places: list[FilePlace] = []
    begin = 0
    for video in sample:
        end = max(begin, spec.chunks.start(spec.chunks.whole_chunks(begin + spec.frames_of(video))))
        places.append(FilePlace(video, begin, end))
        begin = end
    return places


def read_clip(reference: ClipReference, *, size: tuple[int, int]) -> Clip:
    """Read a clip. size: height and width in pixels."""
    reader = VideoReader(reference.fps, size)
    frames = [_read_footage(footage, reader) for footage in reference.footage]
    return Clip(torch.cat(frames), reference.captions, reference.cuts)


def read_frames(reference: ClipReference, first: int, last: int, *, size: tuple[int, int]) -> Tensor:
    """Read only the frames [first, last) of a clip: uint8 [last - first, H, W, 3]."""
    reader = VideoReader(reference.fps, size)
    parts, begin = [], 0
    for footage in reference.footage:
        start, stop = max(first, begin), min(last, begin + footage.num_frames)
        if start < stop:
            later = footage.start_seconds + (start - begin) / reference.fps
            parts.append(_read_footage(replace(footage, start_seconds=later, num_frames=stop - start), reader))
        begin += footage.num_frames
    if not 0 <= first < last <= begin:
        raise UserError(f"frames {first} to {last} of a clip of {begin} frames; expected 0 <= first < last <= {begin}")
    return torch.cat(parts)


def iterate_clips(references: Iterable[ClipReference], *, size: tuple[int, int]) -> Iterator[Clip]:
    """Read clips one after another."""
    for reference in references:
        yield read_clip(reference, size=size)


def _read_footage(footage: Footage, reader: VideoReader) -> Tensor:
    start, expected = footage.start_seconds, footage.num_frames
    frames = reader.read(footage.video, start_seconds=start, max_frames=expected)
    if len(frames) < expected:
        raise UserError(
            f"{footage.video} has {len(frames)} frames after {start:.2f} s, expected {expected}; repair the video, or"
            " remove its line from the manifest"
        )
    return frames


def _reference(places: Sequence[FilePlace], begin: int, spec: ClipSpec) -> ClipReference | None:
    """Return the clip that begins at a frame of a sample; None if no shot covers at least half of one of its chunks."""
    fps, start = spec.fps, spec.chunks.start
    shots: list[tuple[int, int]] = []
    for chunk in range(spec.num_chunks):
        span = ((begin + start(chunk)) / fps, (begin + start(chunk + 1)) / fps)
        shot = _main_shot(places, span, fps)
        if shot is None:
            return None
        shots.append(shot)
    cuts = tuple(i == 0 or shots[i] != shots[i - 1] for i in range(spec.num_chunks))
    captions = tuple(places[file].video.shots[shot].caption for file, shot in shots)
    return ClipReference(_footage(places, begin, begin + spec.num_frames, fps), captions, cuts, fps)


def _footage(places: Sequence[FilePlace], begin: int, end: int, fps: float) -> tuple[Footage, ...]:
    """Return the stretches of files that provide the frames [begin, end) of a sample."""
    stretches: list[Footage] = []
    for place in places:
        first, last = max(begin, place.begin), min(end, place.end)
        if first < last:
            stretches.append(Footage(place.video.video, (first - place.begin) / fps, last - first))
    return tuple(stretches)


def _main_shot(places: Sequence[FilePlace], span: tuple[float, float], fps: float) -> tuple[int, int] | None:
    """Return the file and shot that cover most of `span` (seconds); None if they cover less than half of it."""
    covered: dict[tuple[int, int], float] = {}
    for file, place in enumerate(places):
        begin, end = place.begin / fps, place.end / fps
        for number, shot in enumerate(place.video.shots):
            first = max(span[0], begin + shot.start)
            covered[file, number] = min(span[1], end, begin + shot.end) - first
    best = max(covered, key=covered.__getitem__)
    return best if covered[best] >= (span[1] - span[0]) / 2 else None
