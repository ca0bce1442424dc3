"""Training clips out of a manifest: windows of whole chunks, each chunk with the caption of its shot.

A clip of G chunks has 29 + 32 (G - 1) pixel frames at the model's rate. Windows begin at multiples of 32 frames: the
chunk boundaries inside them, 29 + 32 k after the window's first frame, then fall on those of the whole video, so cuts
that lie on chunk boundaries stay there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from longvideo.data.manifest import VideoEntry
from longvideo.data.video import read_video
from longvideo.errors import UserError


@dataclass(frozen=True)
class ChunkFrames:
    """Pixel frames of the first chunk and of each later one."""

    first: int = 29
    later: int = 32

    def start(self, chunk: int) -> int:
        """First frame of a chunk, and so the number of frames of all chunks before it."""
        return 0 if chunk == 0 else self.first + (chunk - 1) * self.later


@dataclass(frozen=True)
class ClipReference:
    """Where a clip lies: enough to read it, cheap enough to shuffle and share out by the million."""

    video: Path
    start_seconds: float
    captions: tuple[str, ...]
    cuts: tuple[bool, ...]


@dataclass(frozen=True)
class Clip:
    """Frames uint8 [T, H, W, 3], and for each chunk its caption and whether it begins a shot."""

    frames: Tensor
    captions: tuple[str, ...]
    cuts: tuple[bool, ...]


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
        for entry in entries
        for begin in range(0, _frames_at(entry, fps) - chunks.start(num_chunks) + 1, num_chunks * chunks.later)
        if (reference := _reference(entry, begin, num_chunks=num_chunks, fps=fps, chunks=chunks)) is not None
    ]
    if not references:
        wanted = chunks.start(num_chunks) / fps
        raise UserError(f"none of {len(entries)} videos has a captioned stretch of {wanted:.2f} s; use fewer chunks")
    return references


def read_clip(
    reference: ClipReference, *, size: tuple[int, int], fps: float = 24.0, chunks: ChunkFrames | None = None
) -> Clip:
    """Read one clip at `fps` and `size` (height, width)."""
    wanted = (chunks or ChunkFrames()).start(len(reference.captions))
    frames = read_video(reference.video, fps=fps, size=size, start_seconds=reference.start_seconds, max_frames=wanted)
    if len(frames) < wanted:
        raise UserError(
            f"{reference.video} has {len(frames)} frames after {reference.start_seconds:.2f} s, wanted {wanted}; "
            "its manifest line promises more frames than the file holds"
        )
    return Clip(frames, reference.captions, reference.cuts)


def iterate_clips(references: Iterable[ClipReference], *, size: tuple[int, int], fps: float = 24.0) -> Iterator[Clip]:
    """Read clips one after the other."""
    for reference in references:
        yield read_clip(reference, size=size, fps=fps)


def _frames_at(entry: VideoEntry, fps: float) -> int:
    """Number of frames that reading the video at `fps` gives."""
    last = (entry.num_frames - 0.5) / entry.fps
    return int(last * fps - 1e-6) + 1


def _reference(
    entry: VideoEntry, begin: int, *, num_chunks: int, fps: float, chunks: ChunkFrames
) -> ClipReference | None:
    shots: list[int] = []
    for chunk in range(num_chunks):
        span = ((begin + chunks.start(chunk)) / fps, (begin + chunks.start(chunk + 1)) / fps)
        shot = _main_shot(entry, span)
        if shot is None:
            return None
        shots.append(shot)
    cuts = tuple(i == 0 or shots[i] != shots[i - 1] for i in range(num_chunks))
    return ClipReference(entry.video, begin / fps, tuple(entry.shots[shot].caption for shot in shots), cuts)


def _main_shot(entry: VideoEntry, span: tuple[float, float]) -> int | None:
    """The shot that covers most of the seconds of `span`, if it covers half of them."""
    covered = [min(span[1], shot.end / entry.fps) - max(span[0], shot.start / entry.fps) for shot in entry.shots]
    best = max(range(len(covered)), key=covered.__getitem__)
    return best if covered[best] >= (span[1] - span[0]) / 2 else None
