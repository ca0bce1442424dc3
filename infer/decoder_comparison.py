"""Compare two decoders on the same latents, chunk by chunk, to see whether their difference grows with time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from longvideo.infer.saved_latents import decode_videos
from longvideo.pixels import psnr

if TYPE_CHECKING:
    from collections.abc import Callable

    from longvideo.infer.saved_latents import SavedLatents
    from longvideo.streaming.decoders import DecoderModel

DRIFT_SHARE = 0.1
"""Share of the parts of a video at either end whose means are compared."""


@dataclass(frozen=True)
class DecoderComparison:
    """Difference of a decoder from a reference on the same latents.

    video: name of the video. errors: mean squared difference of the pixels of each part, in squared 8-bit levels; a
    part is a chunk, but the opening frame of the first chunk is a part of its own.
    """

    video: str
    errors: tuple[float, ...]

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio of the video in dB: the mean over its parts of the squared difference."""
        return psnr(self.errors)

    @property
    def first_psnr(self) -> float:
        """Peak signal-to-noise ratio of the first tenth of the parts in dB, the opening frame left out."""
        return psnr(self.errors[1 : 1 + self._ends])

    @property
    def last_psnr(self) -> float:
        """Peak signal-to-noise ratio of the last tenth of the parts in dB."""
        return psnr(self.errors[-self._ends :])

    @property
    def _ends(self) -> int:
        return max(1, round(DRIFT_SHARE * len(self.errors)))


def compare_decoders(
    saved: SavedLatents,
    decoder: DecoderModel,
    reference: DecoderModel,
    *,
    chunk_frames: int,
    num_frames: int,
    on_part: Callable[[], None] = lambda: None,
) -> list[DecoderComparison]:
    """Decode every video with both decoders. Other arguments are those of `decode_videos`.

    on_part: called after each part, for progress.
    """
    results = []
    videos = (
        decode_videos(saved, model, chunk_frames=chunk_frames, num_frames=num_frames) for model in (decoder, reference)
    )
    for (video, frames), (_, expected) in zip(*videos, strict=True):
        errors = []
        for part, other in zip(frames, expected, strict=True):
            errors.append(float(np.square(part.astype(np.float32) - other).mean(dtype=np.float64)))
            on_part()
        results.append(DecoderComparison(video.name, tuple(errors)))
    return results
