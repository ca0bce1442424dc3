"""Training clips out of a manifest: windows of whole chunks, each chunk with the caption of its shot.

A clip of G chunks has 29 + 32 (G - 1) pixel frames at the model's rate. Windows begin at multiples of 32 frames: the
chunk boundaries inside them, 29 + 32 k after the window's first frame, then fall on those of the whole video, so cuts
that lie on chunk boundaries stay there.

The files of a sample are one video. Each of them gives whole chunks and what is left at its end is dropped, so the cuts
between files lie on chunk boundaries whatever the lengths of the files are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.data.manifest import VideoEntry
from longvideo.data.video import read_video
from longvideo.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


@dataclass(frozen=True)
class ChunkFrames:
    """Pixel frames of the first chunk and of each later one."""

    first: int = 29
    later: int = 32

    @classmethod
    def of_latents(cls, latent_frames: int, temporal_scale: int) -> ChunkFrames:
        """Sizes of chunks of so many latent frames; the first latent frame of a video holds one pixel frame."""
        return cls((latent_frames - 1) * temporal_scale + 1, latent_frames * temporal_scale)

    def start(self, chunk: int) -> int:
        """First frame of a chunk, and so the number of frames of all chunks before it."""
        return 0 if chunk == 0 else self.first + (chunk - 1) * self.later

    def whole(self, num_frames: int) -> int:
        """Frames of the whole chunks that so many frames hold."""
        return 0 if num_frames < self.first else num_frames - (num_frames - self.first) % self.later


@dataclass(frozen=True)
class Footage:
    """A stretch of one file: `num_frames` frames at the clip's rate, from `start_seconds` on."""

    video: Path
    start_seconds: float
    num_frames: int


@dataclass(frozen=True)
class ClipReference:
    """Where a clip lies: enough to read it, cheap enough to shuffle and share out by the million.

    footage: shown one after the other; one stretch, or several where a clip goes on in the next file of its sample.
    """

    footage: tuple[Footage, ...]
    captions: tuple[str, ...]
    cuts: tuple[bool, ...]

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
    """Frames uint8 [T, H, W, 3], and for each chunk its caption and whether it begins a shot."""

    frames: Tensor
    captions: tuple[str, ...]
    cuts: tuple[bool, ...]


@dataclass(frozen=True)
class FilePlace:
    """Frames [begin, end) of a sample, at the model's rate, are those of one file; none if it is too short."""

    entry: VideoEntry
    begin: int
    end: int


def plan_clips(
    entries: Sequence[VideoEntry], *, num_chunks: int, fps: float = 24.0, chunks: ChunkFrames | None = None
) -> list[ClipReference]:
    """List the clips of `num_chunks` chunks in all videos, in order and without overlap.

    A chunk belongs to the shot that covers most of it; windows with a chunk that no shot covers to at least a half are
    left out. Raises UserError when no video is long enough.
    """
    chunks = chunks or ChunkFrames()
    references = [
        reference
        for sample in group_samples(entries)
        for reference in sample_clips(lay_out(sample, fps=fps, chunks=chunks), num_chunks, fps=fps, chunks=chunks)
    ]
    if not references:
        wanted = chunks.start(num_chunks) / fps
        raise UserError(f"none of {len(entries)} videos has a captioned stretch of {wanted:.2f} s; use fewer chunks")
    return references


def group_samples(entries: Iterable[VideoEntry]) -> list[tuple[VideoEntry, ...]]:
    """Put the entries of each sample together; an entry without one stands alone."""
    named = ((entry.sample or number, entry) for number, entry in enumerate(entries))
    return [tuple(entry for _, entry in group) for _, group in groupby(named, lambda pair: pair[0])]


def lay_out(sample: Sequence[VideoEntry], *, fps: float, chunks: ChunkFrames) -> list[FilePlace]:
    """Place the files of a sample one after the other, each with its whole chunks."""
    places: list[FilePlace] = []
    begin = 0
    for entry in sample:
        end = max(begin, chunks.whole(begin + frames_at(entry, fps)))
        places.append(FilePlace(entry, begin, end))
        begin = end
    return places


def frames_at(entry: VideoEntry, fps: float) -> int:
    """Number of frames that reading the video at `fps` gives."""
    last = (entry.num_frames - 0.5) / entry.fps
    return int(last * fps - 1e-6) + 1


def sample_clips(
    places: Sequence[FilePlace], num_chunks: int, *, fps: float, chunks: ChunkFrames
) -> list[ClipReference]:
    """List the clips of one sample; see `plan_clips`."""
    begins = range(0, places[-1].end - chunks.start(num_chunks) + 1, num_chunks * chunks.later)
    references = (_reference(places, begin, num_chunks=num_chunks, fps=fps, chunks=chunks) for begin in begins)
    return [reference for reference in references if reference is not None]


def read_clip(
    reference: ClipReference, *, size: tuple[int, int], fps: float = 24.0, chunks: ChunkFrames | None = None
) -> Clip:
    """Read one clip at `fps` and `size` (height, width)."""
    wanted = (chunks or ChunkFrames()).start(len(reference.captions))
    assert sum(footage.num_frames for footage in reference.footage) == wanted, "planned with other chunks"
    frames = [_read_footage(footage, size=size, fps=fps) for footage in reference.footage]
    return Clip(torch.cat(frames), reference.captions, reference.cuts)


def read_frames(reference: ClipReference, first: int, last: int, *, size: tuple[int, int], fps: float = 24.0) -> Tensor:
    """Read frames [first, last) of a clip and no others: uint8 [last - first, H, W, 3]."""
    parts, begin = [], 0
    for footage in reference.footage:
        start, stop = max(first, begin), min(last, begin + footage.num_frames)
        if start < stop:
            later = footage.start_seconds + (start - begin) / fps
            part = replace(footage, start_seconds=later, num_frames=stop - start)
            parts.append(_read_footage(part, size=size, fps=fps))
        begin += footage.num_frames
    if not 0 <= first < last <= begin:
        raise UserError(f"frames {first} to {last} of a clip that has {begin}; wanted 0 <= first < last")
    return torch.cat(parts)


def iterate_clips(references: Iterable[ClipReference], *, size: tuple[int, int], fps: float = 24.0) -> Iterator[Clip]:
    """Read clips one after the other."""
    for reference in references:
        yield read_clip(reference, size=size, fps=fps)


def _read_footage(footage: Footage, *, size: tuple[int, int], fps: float) -> Tensor:
    start, wanted = footage.start_seconds, footage.num_frames
    frames = read_video(footage.video, fps=fps, size=size, start_seconds=start, max_frames=wanted)
    if len(frames) < wanted:
        raise UserError(
            f"{footage.video} has {len(frames)} frames after {start:.2f} s, wanted {wanted}; "
            "its manifest line promises more frames than the file holds"
        )
    return frames


def _reference(
    places: Sequence[FilePlace], begin: int, *, num_chunks: int, fps: float, chunks: ChunkFrames
) -> ClipReference | None:
    shots: list[tuple[int, int]] = []
    for chunk in range(num_chunks):
        span = ((begin + chunks.start(chunk)) / fps, (begin + chunks.start(chunk + 1)) / fps)
        shot = _main_shot(places, span, fps)
        if shot is None:
            return None
        shots.append(shot)
    cuts = tuple(i == 0 or shots[i] != shots[i - 1] for i in range(num_chunks))
    captions = tuple(places[file].entry.shots[shot].caption for file, shot in shots)
    return ClipReference(_footage(places, begin, begin + chunks.start(num_chunks), fps), captions, cuts)


def _footage(places: Sequence[FilePlace], begin: int, end: int, fps: float) -> tuple[Footage, ...]:
    """The stretches of files that make frames [begin, end) of a sample."""
    stretches: list[Footage] = []
    for place in places:
        first, last = max(begin, place.begin), min(end, place.end)
        if first < last:
            stretches.append(Footage(place.entry.video, (first - place.begin) / fps, last - first))
    return tuple(stretches)


def _main_shot(places: Sequence[FilePlace], span: tuple[float, float], fps: float) -> tuple[int, int] | None:
    """The file and shot that cover most of the seconds of `span`, if they cover half of them."""
    covered: dict[tuple[int, int], float] = {}
    for file, place in enumerate(places):
        begin, end = place.begin / fps, place.end / fps
        for number, shot in enumerate(place.entry.shots):
            first = max(span[0], begin + shot.start / place.entry.fps)
            covered[file, number] = min(span[1], end, begin + shot.end / place.entry.fps) - first
    best = max(covered, key=covered.__getitem__)
    return best if covered[best] >= (span[1] - span[0]) / 2 else None
