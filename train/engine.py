"""One process, one device: what stands between the trainer and torch.

The trainer speaks to this object alone, so another engine (DeepSpeed) can take its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longvideo.checkpoint.tensors import own_tensors
from longvideo.errors import CheckpointError
from longvideo.train.objective import Objective
from longvideo.train.optimizer import OptimizerConfig
from longvideo.train.precision import autocast


class Engine:
    """Runs an objective and its optimiser: fp32 weights, forward under `train.precision.autocast`.

    A step whose gradient is not finite changes neither weights nor optimiser; it is counted in `skipped`.
    """

    def __init__(self, objective: Objective, config: OptimizerConfig, *, precision: str, device: torch.device):
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
        self.skipped = torch.zeros((), device=device)

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(self.precision, self.device):
            return self.objective(batch)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip(self) -> Tensor:
        """Scale the gradients down to the norm `gradient_clip`; return the norm they had."""
        return torch.nn.utils.clip_grad_norm_(self.parameters, self.gradient_clip, foreach=True)

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

    def load(self, weights: Mapping[str, Tensor], optimizer_state: Mapping[str, Tensor]) -> None:
        """Take back what `weights` and `optimizer_state` gave; raises CheckpointError when the model differs."""
        own = own_tensors(self.objective)
        different = [k for k in own.keys() | weights.keys() if k not in own or k not in weights]
        different += [k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape]
        if different:
            raise CheckpointError(
                f"the checkpoint belongs to another model: {len(different)} tensors differ, among them"
                f" {', '.join(sorted(different)[:3])}; use the configuration it was made with, or another --out"
            )
        for name, tensor in own.items():
            tensor.copy_(weights[name])
        for name, parameter in self.named.items():
            prefix = f"{name}/"
            self.optimizer.state[parameter] = {
                key.removeprefix(prefix): _moment(value, parameter, key)
                for key, value in optimizer_state.items()
                if key.startswith(prefix)
            }


def _moment(value: Tensor, parameter: Tensor, key: str) -> Tensor:
    value = value.to(parameter.device)
    # the fused update wants moments laid out as the weights are
    return value if key.endswith("/step") else torch.empty_like(parameter).copy_(value)
