"""What stands between the trainer and torch: the weights of an objective, their optimiser and their average."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from longvideo.checkpoint.modules import own_tensors
from longvideo.errors import CheckpointError
from longvideo.training.ema import ExponentialMovingAverage
from longvideo.training.guard import LossGuard
from longvideo.training.objective import Objective, as_ratio
from longvideo.training.optimizer import OptimizerConfig
from longvideo.training.precision import autocast


class Engine(Protocol):
    """Weights are fp32 masters. A step whose gradient is not finite changes nothing; it is counted."""

    def train_step(self, shares: Sequence[Any], step: int, learning_rate: float) -> dict[str, Tensor]:
        """Add up the gradients of all shares, clip, step and average. Return loss, grad and metrics, as ratios."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """Put the averaged weights in place inside the block. Every rank enters it."""
        ...

    def num_skipped(self) -> int: ...

    def skipped_share(self, steps: int) -> float:
        """Return the share of the first `steps` steps that changed nothing; of several optimizers, the largest."""
        ...

    def is_finite(self) -> bool:
        """Say whether all weights and averages of this rank are finite; the host waits for the device."""
        ...

    def counts(self) -> dict[str, float]:
        """Return the numbers that belong to a checkpoint."""
        ...

    def save(self, folder: Path) -> None:
        """Write all there is into files of this rank; every rank calls it."""
        ...

    def load(self, folder: Path, *, counts: Mapping[str, Any]) -> None:
        """Take back what `save` and `counts` gave. Raises CheckpointError where files are damaged or do not fit."""
        ...


class LocalEngine:
    """One process, one device: fp32 weights, forward under `train.precision.autocast`."""

    def __init__(
        self,
        objective: Objective,
        config: OptimizerConfig,
        *,
        precision: str,
        device: torch.device,
        ema_decay: float = 0.0,
        spike_factor: float = 0.0,
    ):
        self.objective = objective
        self.device = device
        self.precision = precision
        self.gradient_clip = config.gradient_clip
        self.named = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        self.parameters = list(self.named.values())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.ema = ExponentialMovingAverage(self.named, ema_decay)
        self.guard = LossGuard(spike_factor, device)
        self.skipped = torch.zeros((), device=device)

    def train_step(self, shares: Sequence[Any], step: int, learning_rate: float) -> dict[str, Tensor]:
        self.objective.begin(step)
        metrics: dict[str, Tensor] = {}
        for share in shares:
            loss, found = self.loss(share)
            guarded = self.guard(loss)
            self.backward(guarded / len(shares) if len(shares) > 1 else guarded)
            add_metrics(metrics, {"loss": loss, **found})
        norm = self.clip()
        self.step(learning_rate, norm)
        self.ema.update(step)
        return metrics | {"grad": as_ratio(norm)}

    def averaged(self) -> AbstractContextManager[None]:
        return self.ema.applied()

    def num_skipped(self) -> int:
        return int(self.skipped)

    def skipped_share(self, steps: int) -> float:
        return self.num_skipped() / max(1, steps)

    def is_finite(self) -> bool:
        return all_finite([*self.parameters, *self.ema.average])

    def counts(self) -> dict[str, float]:
        return {"skipped": self.num_skipped(), **self.guard.state()}

    def save(self, folder: Path) -> None:
        parts = {"weights": self.weights(), "optimizer": self.optimizer_state(), "ema": self.ema.state()}
        for part, tensors in parts.items():
            save_file({name: x.detach().contiguous() for name, x in tensors.items()}, folder / f"{part}.safetensors")

    def load(self, folder: Path, *, counts: Mapping[str, Any]) -> None:
        weights, optimizer, ema = (read_part(folder, part) for part in ("weights", "optimizer", "ema"))
        self.take(weights, optimizer)
        self.ema.load(ema)
        self.skipped.fill_(float(counts["skipped"]))
        self.guard.load(counts)

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(self.precision, self.device):
            return self.objective(batch)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip(self) -> Tensor:
        """Scale the gradients down to the norm `gradient_clip`, unless it is 0; return the norm they had."""
        largest = self.gradient_clip or math.inf
        return torch.nn.utils.clip_grad_norm_(self.parameters, largest, foreach=True)

    def step(self, learning_rate: float, gradient_norm: Tensor) -> None:
        """Update the weights unless the gradient norm is not finite, and clear the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        # The fused kernel reads this flag on the device, as torch.amp.GradScaler uses it: skipping needs no host sync.
        found_inf = (~torch.isfinite(gradient_norm)).float()
        self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.optimizer.step()
        self.skipped += found_inf
        self.optimizer.zero_grad(set_to_none=True)

    def weights(self) -> dict[str, Tensor]:
        """Return parameters and persistent buffers; tied ones once."""
        return own_tensors(self.objective)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return the moments and step counts as flat tensors, named after the parameters they belong to."""
        state = self.optimizer.state
        return {f"{name}/{key}": value for name, p in self.named.items() for key, value in state[p].items()}

    def take(self, weights: Mapping[str, Tensor], optimizer_state: Mapping[str, Tensor]) -> None:
        """Take back what `weights` and `optimizer_state` gave; raises CheckpointError when the model differs."""
        own = own_tensors(self.objective)
        check_same({name: x.shape for name, x in own.items()}, {name: x.shape for name, x in weights.items()})
        for name, tensor in own.items():
            tensor.copy_(weights[name])
        for name, parameter in self.named.items():
            prefix = f"{name}/"
            self.optimizer.state[parameter] = {
                key.removeprefix(prefix): _moment(value, parameter, key)
                for key, value in optimizer_state.items()
                if key.startswith(prefix)
            }


@torch.no_grad()
def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Say whether no value is infinite or NaN; the host waits once, not for every tensor."""
    largest = [x.detach().abs().amax().float() for x in tensors if x.numel()]
    return not largest or bool(torch.isfinite(torch.stack(largest)).all())


def add_metrics(sums: dict[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Add metrics to sums of ratios."""
    for name, value in found.items():
        sums[name] = sums[name] + as_ratio(value) if name in sums else as_ratio(value)


def check_same(own: Mapping[str, torch.Size], found: Mapping[str, torch.Size]) -> None:
    """Raise CheckpointError unless a checkpoint holds the tensors of the model that is trained."""
    different = sorted(name for name in own.keys() | found.keys() if own.get(name) != found.get(name))
    if different:
        raise CheckpointError(
            f"the checkpoint belongs to another model: {len(different)} tensors differ, among them"
            f" {', '.join(different[:3])}; use the configuration it was made with, or another --out"
        )


def read_part(folder: Path, name: str) -> dict[str, Tensor]:
    """Read one file of a checkpoint; raises CheckpointError when it is damaged or not there."""
    try:
        return load_file(folder / f"{name}.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is damaged ({error}); remove it to resume from the one before") from error


def _moment(value: Tensor, parameter: Tensor, key: str) -> Tensor:
    value = value.to(parameter.device)
    # the fused update wants moments laid out as the weights are
    return value if key.endswith("/step") else torch.empty_like(parameter).copy_(value)
