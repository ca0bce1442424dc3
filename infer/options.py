"""How a video is sampled: ranges that are checked before anything heavy is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass

from longvideo.errors import UserError

MAX_STEPS = 1000
MAX_GUIDANCE = 50.0
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class SamplingOptions:
    """Solver steps a chunk, classifier-free guidance scale (1 is none) and seed; None takes the model's own default."""

    steps: int | None = None
    guidance: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps is not None and not 1 <= self.steps <= MAX_STEPS:
            raise UserError(f"steps is {self.steps}; it must be from 1 to {MAX_STEPS}")
        guidance = self.guidance
        if guidance is not None and not (math.isfinite(guidance) and 0 <= guidance <= MAX_GUIDANCE):
            raise UserError(f"guidance is {guidance:g}; it must be from 0 to {MAX_GUIDANCE:g} (1 means none)")
        if not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"seed is {self.seed}; it must be from 0 to {MAX_SEED}")
