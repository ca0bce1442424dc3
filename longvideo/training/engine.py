"""The layer between trainer and torch: the weights of an objective, their optimizer and their average."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from longvideo.checkpoint.run_checkpoint import AVERAGE, MOMENTS, STEP, WEIGHT
from longvideo.checkpoint.tensors import Lazy, read
from longvideo.training.checkpoint import Trained
from longvideo.training.ema import ExponentialMovingAverage
from longvideo.training.guard import LossGuard
from longvideo.training.objective import Objective, as_ratio
from longvideo.training.optimizer import new_optimizer
from longvideo.training.precision import TrainingPrecision, autocast, resolve
from longvideo.training.ramping import RampingAdamW

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from longvideo.training.adamw import FusedAdamW
    from longvideo.training.objective import WeightStates
    from longvideo.training.optimizer import OptimizerConfig


class Engine(Trained, Protocol):
    """Weights are fp32 masters. A step whose gradient is not finite changes no weight and no moment, and is counted."""

    def train_step(self, shares: Sequence[Any], step: int, learning_rate: float) -> dict[str, Tensor]:
        """Add up the gradients of all shares, clip, step and average. Return loss, grad and metrics, as ratios."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """Put the averaged weights in place inside the block. Every rank enters it."""
        ...

    def num_skipped(self) -> int:
        """Return the number of steps that changed no weight."""
        ...

    def skipped_share(self, steps: int) -> float:
        """Return the share of the first `steps` steps that changed no weight; of several optimizers, the largest."""
        ...

    def is_finite(self) -> bool:
        """Return whether all weights and averages of this rank are finite. The host waits for the device."""
        ...


class LocalEngine:
    """An `Engine` of one process and device: fp32 weights, forward passes under `precision.autocast`.

    precision: number format of the products. ema_decay, ema_start: see `decay_at`; a decay of 0 averages nothing.
    spike_factor: see `LossGuard`.
    """

    def __init__(
        self,
        objective: Objective,
        config: OptimizerConfig,
        *,
        precision: TrainingPrecision,
        device: torch.device,
        ema_decay: float = 0.0,
        ema_start: int = 0,
        spike_factor: float = 0.0,
    ) -> None:
        self.objective = objective
        self.device = device
        self.precision: TrainingPrecision = precision
        self.gradient_clip = config.gradient_clip
        self.named = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        self.parameters = list(self.named.values())
        self.states = objective.weight_states
        self.optimizer = new_optimizer(config, self.parameters, () if self.states is None else self.states.ramped)
        self.ema = ExponentialMovingAverage(self.named, ema_decay, ema_start)
        self.guard = LossGuard(spike_factor, device)
        self.skipped = torch.zeros((), device=device)

    def train_step(self, shares: Sequence[Any], step: int, learning_rate: float) -> dict[str, Tensor]:
        self.objective.begin(step)
        metrics: dict[str, Tensor] = {}
        for share in shares:
            loss, more = self.loss(share)
            guarded = self.guard(loss)
            (guarded / len(shares) if len(shares) > 1 else guarded).backward()
            add_metrics(metrics, {"loss": loss, **more})
        if self.objective.layer_watch is not None:
            self.objective.layer_watch.add_gradients(lambda name: self.named[name].grad)
        norm = self.clip()
        skipped = self.step(learning_rate, norm)
        if self.states is not None:
            metrics |= self.states.after_step(step, skipped, self)
        self.ema.update(step)
        return metrics | {"grad": as_ratio(norm)}

    def averaged(self) -> AbstractContextManager[None]:
        return self.ema.applied()

    def num_skipped(self) -> int:
        return int(self.skipped)

    def skipped_share(self, steps: int) -> float:
        return self.num_skipped() / max(1, steps)

    def is_finite(self) -> bool:
        return all_finite([*self.parameters, *self.ema.average.values()])

    @property
    def arithmetic(self) -> str:
        bf16 = resolve(self.precision, self.device) == "bf16"
        return "fp32 weights, products in bf16" if bf16 else "fp32"

    def shapes(self) -> dict[str, torch.Size]:
        return {name: parameter.shape for name, parameter in self.named.items()}

    def more_shapes(self) -> dict[str, torch.Size]:
        return more_shapes(self.optimizer, self.named, self.states)

    def whole(self, name: str, kind: str) -> Tensor:
        parameter = self.named[name]
        if self.states is not None and f"{name}/{kind}" in self.states.shapes():
            return self.states.whole(name, kind)
        if kind == WEIGHT:
            return parameter
        if kind == AVERAGE:
            return self.ema.average[name]
        state = self.optimizer.state[parameter]
        if kind in state:
            return state[kind]
        if kind == STEP:
            return torch.zeros(())
        return torch.zeros(self.more_shapes().get(f"{name}/{kind}", parameter.shape))

    @torch.no_grad()
    def put(self, name: str, kind: str, stored: Lazy) -> None:
        parameter, value = self.named[name], read(stored)
        if self.states is not None and f"{name}/{kind}" in self.states.shapes():
            self.states.put(name, kind, value)
        elif kind == WEIGHT:
            parameter.copy_(value)
            if self.states is not None:
                self.states.weight_loaded(name)
        elif kind == AVERAGE:
            self.ema.put(name, value)
        elif kind not in MOMENTS:
            self.optimizer.state[parameter][kind] = value.to(parameter.device)
        else:
            # the fused update requires moments with the strides of the weights
            self.optimizer.state[parameter][kind] = torch.empty_like(parameter).copy_(value)

    @torch.no_grad()
    def replace(self, name: str, values: Tensor) -> None:
        parameter = self.named[name]
        parameter.copy_(torch.where(values.isnan(), parameter, values))

    def set_periods(self, name: str, periods: Tensor) -> None:
        assert isinstance(self.optimizer, RampingAdamW)
        self.optimizer.set_periods(self.named[name], periods)

    def counts(self) -> dict[str, float]:
        return {"skipped": self.num_skipped(), **self.guard.state()}

    def put_counts(self, counts: Mapping[str, float]) -> None:
        self.skipped.fill_(counts["skipped"])
        self.guard.load(counts)

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the objective's loss and metrics, computed in the precision of the engine."""
        with autocast(self.precision, self.device):
            return self.objective(batch)

    def clip(self) -> Tensor:
        """Scale the gradients down to the norm `gradient_clip`, unless that is 0; return the norm that they had."""
        largest = self.gradient_clip or math.inf
        return torch.nn.utils.clip_grad_norm_(self.parameters, largest, foreach=True)

    def step(self, learning_rate: float, gradient_norm: Tensor) -> Tensor:
        """Update the weights unless the gradient norm is not finite; clear the gradients. Return 1 if it skipped."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        # the fused kernel reads this flag on the device, as for torch.amp.GradScaler: skipping needs no host sync
        found_inf = (~torch.isfinite(gradient_norm)).float()
        self.optimizer.found_inf = found_inf
        self.optimizer.step()
        self.skipped += found_inf
        self.optimizer.zero_grad(set_to_none=True)
        return found_inf


def more_shapes(
    optimizer: FusedAdamW, named: Mapping[str, nn.Parameter], states: WeightStates | None
) -> dict[str, torch.Size]:
    """Return the shapes of all states except moments and steps, by NAME/KIND."""
    of_optimizer = {
        f"{name}/{kind}": shape
        for name, parameter in named.items()
        for kind, shape in optimizer.more_states(parameter).items()
    }
    return of_optimizer | ({} if states is None else states.shapes())


@torch.no_grad()
def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether no value is infinite or NaN. The host waits once, not for every tensor."""
    largest = [x.detach().abs().amax().float() for x in tensors if x.numel()]
    return not largest or bool(torch.isfinite(torch.stack(largest)).all())


def add_metrics(sums: dict[str, Tensor], metrics: Mapping[str, Tensor]) -> None:
    """Add metrics to `sums`, ratios by name, in place."""
    for name, value in metrics.items():
        sums[name] = sums[name] + as_ratio(value) if name in sums else as_ratio(value)
