"""The inputs that decide what a video shows: one step for each chunk, solver, guidance, noise and beginning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.flow.unipc import UniPC
from longvideo.infer.history import Past
from longvideo.infer.timeline import Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longvideo.checkpoint.settings import ModelSettings
    from longvideo.infer.options import SamplingOptions


@dataclass(frozen=True)
class VideoInputs:
    """Inputs that decide what a video shows, or a batch of videos that share their cuts.

    steps: one for each chunk. generators: one for each sample of the batch; noise is drawn from them. first_latent:
    [B, C, 1, H, W], normalized, fixed as the first latent frame. past: chunks that the first step continues.
    """

    steps: Iterator[Step]
    solver: UniPC
    guidance: float
    generators: tuple[torch.Generator, ...]
    first_latent: Tensor | None = None
    past: Past | None = None

    @classmethod
    def of(
        cls,
        steps: Iterator[Step],
        settings: ModelSettings,
        options: SamplingOptions,
        *,
        generators: Sequence[torch.Generator],
        first_latent: Tensor | None = None,
        past: Past | None = None,
    ) -> VideoInputs:
        """Return the inputs of a video that is sampled by options, or by the model's settings where they are None.

        The others are fields.
        """
        return cls(
            steps=steps,
            solver=UniPC(settings.steps if options.steps is None else options.steps, settings.shift),
            guidance=settings.guidance if options.guidance is None else options.guidance,
            generators=tuple(generators),
            first_latent=first_latent,
            past=past,
        )
