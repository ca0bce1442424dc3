"""The interface between trainer and model: an objective, which is a loss of a batch, and a source of batches."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from longvideo.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longvideo.distributed import Mesh
    from longvideo.quantization.training.weights_over_time import WeightEngine
    from longvideo.training.layer_watch import LayerWatch


SIGMA_BUCKETS = 4
"""Number of ranges of the noise level that have a metric each."""


class WeightStates(Protocol):
    """States of weights besides those of the optimizer, such as averages, and what they do after every step."""

    @property
    def setting(self) -> str:
        """The setting that needs these states, for messages."""
        ...

    @property
    def ramped(self) -> Sequence[nn.Parameter]:
        """Parameters whose numbers have update periods, see `RampingAdamW`."""
        ...

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shapes of all states, by NAME/KIND."""
        ...

    def whole(self, name: str, kind: str) -> Tensor:
        """Return a state of a weight. Every rank calls it."""
        ...

    def put(self, name: str, kind: str, value: Tensor) -> None:
        """Set a state of a weight from a checkpoint."""
        ...

    def weight_loaded(self, name: str) -> None:
        """Note that a weight was set from a checkpoint."""
        ...

    def after_step(self, step: int, skipped: Tensor, engine: WeightEngine, /) -> dict[str, Tensor]:
        """Follow the weights after a step; return metrics, the same in every step. skipped: 1 for a skipped step."""
        ...


class Objective(nn.Module):
    """A module whose parameters are trained and whose forward returns the loss and its metrics.

    A metric is a scalar, or `ratio(total, weight)` if the mean over steps is to be weighted. Metrics stay on the device
    until a log step. weight_states: states of the weights besides those of the optimizer.
    layer_watch: measures the layers that train in 4 bits, where there are some.
    """

    weight_states: WeightStates | None = None
    layer_watch: LayerWatch | None = None

    def begin(self, step: int) -> None:
        """Prepare a step; called before its first batch."""

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError


def compile_fact(configured: bool, device: torch.device) -> str:
    """Describe for the start line of a run whether its objective is compiled, and if not, why."""
    if configured and device.type == "cuda":
        return "compiled: yes"
    return f"compiled: no ({f'only on CUDA, not on {device.type}' if configured else 'as configured'})"


class BatchSource(Protocol):
    """Batches as a function of the step alone, so that a resumed run gets the batches of an uninterrupted one."""

    @property
    def unit(self) -> str:
        """Unit that `size` counts, for the step line: "tok" or "frame"."""
        ...

    def shares(self, step: int, mesh: Mesh, micro_batch: int | None, /) -> Sequence[Any]:
        """Return this rank's share of a step's batch, one part for each pass.

        micro_batch: number of videos of a pass; by default one pass has all of them.
        """
        ...

    def passes(self, mesh: Mesh, micro_batch: int | None, /) -> int:
        """Return the number of backward passes of a step. Raises ConfigError if it is not the same in all stages."""
        ...

    def size(self, step: int, /) -> int:
        """Return the number of units in the batch of a step."""
        ...


class TrainingStage(Protocol):
    """A run of steps."""

    @property
    def steps(self) -> int: ...


AnyStage = TypeVar("AnyStage", bound=TrainingStage)


def check_stages(stages: Sequence[TrainingStage]) -> None:
    """Raise ConfigError for a configuration without stages."""
    if not stages:
        raise ConfigError("stages is empty; expected at least one stage, such as {steps: 100}")


def stage_at(stages: Sequence[AnyStage], step: int) -> AnyStage:
    """Return the stage that a step belongs to; steps past the end belong to the last."""
    for stage in stages:
        if step < stage.steps:
            return stage
        step -= stage.steps
    return stages[-1]


def ratio(total: Tensor, weight: Tensor) -> Tensor:
    """Return a metric whose value is the sum of totals over the sum of weights of all steps since the last log line."""
    return torch.stack((total.detach().float(), weight.detach().float()))


def as_ratio(value: Tensor) -> Tensor:
    """Return a metric as a ratio; a scalar counts as one."""
    value = value.detach().float()
    return value if value.ndim else torch.stack((value, torch.ones_like(value)))


def by_noise_level(name: str, error_BT: Tensor, sigma_BT: Tensor, weight_BT: Tensor) -> dict[str, Tensor]:
    """Return metrics with the mean error of each quarter of the noise levels, `name`_0.25 to `name`_1.

    error_BT: error of every frame, [B, T], already multiplied by its weight. sigma_BT: its noise level, from 0 to 1.
    """
    metrics = {}
    bucket = (sigma_BT * SIGMA_BUCKETS).long().clamp(max=SIGMA_BUCKETS - 1)
    for index in range(SIGMA_BUCKETS):
        chosen = (bucket == index).float()
        mean = ratio((error_BT * chosen).sum(), (weight_BT * chosen).sum())
        metrics[f"{name}_{(index + 1) / SIGMA_BUCKETS:g}"] = mean
    return metrics


def seeded(generator: torch.Generator, *parts: int | str) -> torch.Generator:
    """Seed `generator` from all parts together, so that streams of numbers with different parts are independent."""
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
    return generator.manual_seed(int.from_bytes(digest, "big") >> 1)
