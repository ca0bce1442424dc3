"""How the pixel frames of a video are divided into chunks.

An autoencoder encodes the first pixel frame of a video to a latent frame of its own, and each further latent frame
encodes as many pixel frames as its temporal scale. So the first chunk has fewer pixel frames than every later one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ChunkFrames:
    """Number of pixel frames of the first chunk and of each later chunk."""

    first: int
    later: int

    @classmethod
    def of_latents(cls, latent_frames: int, temporal_scale: int) -> ChunkFrames:
        """Return the sizes of chunks of `latent_frames`. temporal_scale: pixel frames for each latent frame."""
        return cls(1 + (latent_frames - 1) * temporal_scale, latent_frames * temporal_scale)

    def start(self, chunk: int) -> int:
        """Return the first pixel frame of a chunk, which is the number of pixel frames of all chunks before it."""
        return 0 if chunk == 0 else self.first + (chunk - 1) * self.later

    def whole_chunks(self, num_frames: int) -> int:
        """Return the number of whole chunks in `num_frames` pixel frames from the beginning of a video."""
        return 0 if num_frames < self.first else 1 + (num_frames - self.first) // self.later

    def chunks_for(self, num_frames: float) -> int:
        """Return the least number of chunks that hold `num_frames` pixel frames, at least 1."""
        return 1 + max(0, math.ceil((num_frames - self.first) / self.later))


WAN_CHUNKS = ChunkFrames.of_latents(8, temporal_scale=4)
"""Chunks of 8 latent frames of Wan2.2's autoencoder: 29 pixel frames, then 32."""
