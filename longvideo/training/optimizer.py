"""The optimizer of a run, and its learning rate as a function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from longvideo.config.fields import Bounded, bounded, share, steps_field
from longvideo.errors import ConfigError
from longvideo.training.adamw import FusedAdamW
from longvideo.training.objective import stage_at
from longvideo.training.ramping import RampingAdamW
from longvideo.training.spam import Spam
from longvideo.training.stable_spam import StableSpam

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import nn

OptimizerName = Literal["adamw", "spam", "stable-spam"]
DEFAULT_RESETS = {"spam": 500, "stable-spam": 1000}
"""Number of updates between two resets that the papers use."""


@dataclass(frozen=True)
class OptimizerConfig(Bounded):
    """AdamW or one of its descendants, with a linear warm-up of the learning rate.

    name: `adamw`; `spam`, which clips spikes of single gradient values and resets its moments (arXiv 2501.06842); or
        `stable-spam`, which clips by the largest gradients so far and smooths the norm of every parameter's gradient
        (arXiv 2502.17055).
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
    reset_every: number of updates after which `spam` and `stable-spam` set both running means to zero; by default 500
        and 1000, and 0 never.
    reset_warmup: number of updates after a reset in which the learning rate of `spam` rises again.
    spike_ratio: ratio of a squared gradient value to its running mean above which `spam` clips the value.
    spike_after: number of updates after a reset in which `spam` clips nothing, since that mean is still far too small.
    largest_decay: decay of the running mean of the largest gradient value, by which `stable-spam` clips.
    norm_decay: decay of the running mean of a gradient's norm in `stable-spam`.
    norm_square_decay: decay of the running mean of the squared norm in `stable-spam`.
    """

    name: OptimizerName = "adamw"
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
    reset_every: int | None = bounded(None, least=0)
    reset_warmup: int = bounded(150, least=0)
    spike_ratio: float = bounded(5000.0, above=0)
    spike_after: int = bounded(20, least=1)
    largest_decay: float = bounded(0.999, above=0, below=1)
    norm_decay: float = bounded(0.7, above=0, below=1)
    norm_square_decay: float = bounded(0.9, above=0, below=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name == "adamw" and self.reset_every is not None:
            raise ConfigError(
                f"reset_every is {self.reset_every}, but adamw has no resets; use name=spam or stable-spam"
            )
        if self.name == "spam" and 0 < self.resets < self.reset_warmup:
            raise ConfigError(
                f"reset_warmup is {self.reset_warmup}; expected at most {self.resets}, the updates between two resets"
            )

    @property
    def resets(self) -> int:
        """Number of updates between two resets, 0 for none."""
        return DEFAULT_RESETS.get(self.name, 0) if self.reset_every is None else self.reset_every


def new_optimizer(
    config: OptimizerConfig, parameters: Iterable[nn.Parameter], ramped: Sequence[nn.Parameter] = ()
) -> FusedAdamW:
    """Return the optimizer of a configuration.

    ramped: as of `RampingAdamW`. Raises ConfigError if another optimizer than AdamW is to ramp.
    """
    adamw = {
        "learning_rate": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if ramped:
        if config.name != "adamw":
            raise ConfigError(
                f"products.parts.weights_over_time=q-ramping changes adamw, but optimizer.name is {config.name}; use"
                " optimizer.name=adamw, or weights_over_time=reset"
            )
        return RampingAdamW(parameters, ramped=ramped, **adamw)
    if config.name == "spam":
        return Spam(
            parameters,
            spike_ratio=config.spike_ratio,
            spike_after=config.spike_after,
            reset_warmup=config.reset_warmup,
            reset_every=config.resets,
            **adamw,
        )
    if config.name == "stable-spam":
        return StableSpam(
            parameters,
            largest_decay=config.largest_decay,
            norm_decay=config.norm_decay,
            norm_square_decay=config.norm_square_decay,
            reset_every=config.resets,
            **adamw,
        )
    return FusedAdamW(parameters, **adamw)


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
