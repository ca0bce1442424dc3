"""AdamW and its learning rate as a function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from longvideo.config.fields import Bounded, bounded, share, steps_field
from longvideo.training.objective import stage_at

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True)
class OptimizerConfig(Bounded):
    """AdamW, with a linear warm-up of the learning rate.

    learning_rate: largest learning rate; a stage can replace it.
    schedule: `constant`; `cosine` down to `final_fraction` over all stages together; or `wsd` (warm-up, stable, decay),
        which is constant until the last `decay_fraction` of all steps and then linear down to `final_fraction`.
    warmup_steps: number of steps in which the learning rate rises from 0.
    final_fraction: share of the learning rate that `cosine` and `wsd` end at.
    decay_fraction: share of all steps in which the learning rate of `wsd` decays.
    beta1: decay of the running mean of the gradient.
    beta2: decay of the running mean of the squared gradient.
    eps: number added to the root of the squared gradient.
    weight_decay: share of each weight, times the learning rate, that a step takes away.
    gradient_clip: largest norm of the gradient; 0 clips nothing.
    """

    learning_rate: float = bounded(1e-3, above=0)
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    warmup_steps: int = steps_field(100)
    final_fraction: float = share(0.02)
    decay_fraction: float = share(0.2)
    beta1: float = bounded(0.9, least=0, below=1)
    beta2: float = bounded(0.99, least=0, below=1)
    eps: float = bounded(1e-8, above=0)
    weight_decay: float = bounded(0.0, least=0)
    gradient_clip: float = bounded(1.0, least=0)


@dataclass(frozen=True)
class RateSegment:
    """A run of steps with one peak of the learning rate.

    steps: number of steps. learning_rate: peak that replaces the optimizer's.
    """

    steps: int
    learning_rate: float | None = None


def rate_schedule(config: OptimizerConfig, segments: Sequence[RateSegment]) -> Callable[[int], float]:
    """Return the learning rate as a function of the step, over all segments together."""
    total = sum(segment.steps for segment in segments)

    def rate(step: int) -> float:
        rate_of_segment = stage_at(segments, step).learning_rate
        peak = config.learning_rate if rate_of_segment is None else rate_of_segment
        warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        if config.schedule == "constant":
            return peak * warmup
        if config.schedule == "wsd":
            onset = decay_onset(config, total)
            progress = min(1.0, max(0, step - onset) / max(1, total - onset))
            return peak * warmup * (1 - (1 - config.final_fraction) * progress)
        progress = min(1.0, step / max(1, total))
        cosine = config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
        return peak * warmup * cosine

    return rate


def decay_onset(config: OptimizerConfig, total_steps: int) -> int:
    """Return the step at which the learning rate of the schedule `wsd` starts to decay."""
    return total_steps - round(config.decay_fraction * total_steps)
