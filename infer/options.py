"""How a video is sampled: ranges that are checked before anything heavy is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass

from longvideo.errors import UserError

MAX_STEPS = 1000
MAX_GUIDANCE = 50.0
MAX_SEED = 2**63 - 1
PRECISIONS = ("bf16", "nvfp4", "nvfp4-weights")
KV_CACHES = ("bf16", "nvfp4")


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


@dataclass(frozen=True)
class NumberFormats:
    """In how many bits a model computes and remembers.

    precision: of the transformer. "bf16" (float32 on a CPU without bfloat16 units); "nvfp4", weights and inputs of the
        blocks' linear layers; "nvfp4-weights", only the weights. None is "nvfp4" for a packed folder, else "bf16".
    kv_cache: of the chunks already made, "bf16" or "nvfp4".
    """

    precision: str | None = None
    kv_cache: str = "bf16"

    def __post_init__(self) -> None:
        for name, value, known in (("precision", self.precision, PRECISIONS), ("kv_cache", self.kv_cache, KV_CACHES)):
            if value is not None and value not in known:
                raise UserError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
