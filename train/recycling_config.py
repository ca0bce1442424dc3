"""Configuration of error recycling, and the memory that it leaves for errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from longvideo.config.fields import Bounded, bounded, share
from longvideo.errors import ConfigError
from longvideo.flow.schedule import NUM_TRAIN_TIMESTEPS
from longvideo.training.memory import GIB

DTYPE = torch.bfloat16
"""Number format of stored errors."""


@dataclass(frozen=True)
class ErrorRecyclingConfig(Bounded):
    """How errors are kept and how often they are injected.

    buckets: number of equal ranges of the training timesteps, each with its own errors.
    entries: largest number of errors in a bucket.
    memory_gib: memory of a rank for errors; it may allow fewer entries.
    storage: `host`, which is pinned memory next to a GPU, or `device`.
    warmup_steps: number of steps that inject nothing and keep every error.
    clean_probability: share of later samples that get no error.
    clean_kept: share of the errors of samples without injected errors that is kept.
    context_probability: share of the other samples that get errors in their context.
    latent_probability: share of the other samples that get errors in their latents.
    noise_probability: share of the other samples that get errors in their noise.
    modulation: largest relative change of an error; a factor from 1 - modulation to 1 + modulation scales it.
    """

    buckets: int = bounded(50, least=1, most=NUM_TRAIN_TIMESTEPS)
    entries: int = bounded(500, least=1)
    memory_gib: float = bounded(8.0, above=0)
    storage: Literal["host", "device"] = "host"
    warmup_steps: int = bounded(50, least=0)
    clean_probability: float = share(0.2)
    clean_kept: float = share(0.1)
    context_probability: float = share(0.9)
    latent_probability: float = share(0.9)
    noise_probability: float = share(0.01)
    modulation: float = bounded(0.3, least=0, below=1)

    @property
    def kinds(self) -> int:
        """Number of tensors of errors: latent errors, and noise errors if they are used at all."""
        return 2 if self.noise_probability > 0 else 1

    def entries_within_memory(self, chunk_numel: int, *, pinned: bool) -> int:
        """Return the number of entries in each bucket. Raises ConfigError if not one entry fits.

        chunk_numel: numbers of a chunk. pinned: whether the memory is pinned.
        """
        limit = int(self.memory_gib * GIB)
        if pinned and limit:
            # torch rounds an allocation of pinned memory up to a power of two
            limit = 1 << (limit.bit_length() - 1)
        one_of_each = self.kinds * self.buckets * chunk_numel * DTYPE.itemsize
        entries = min(self.entries, limit // one_of_each)
        if entries < 1:
            raise ConfigError(
                f"recycling.memory_gib is {self.memory_gib}; expected at least {one_of_each / GIB:.3g}, for one entry"
                f" in each of recycling.buckets={self.buckets}; use more memory or fewer buckets"
            )
        return entries
