"""Q-Ramping: AdamW in which oscillating weights average several gradients for each update (arXiv 2502.20853)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longvideo.checkpoint.run_checkpoint import MOMENTS, STEP
from longvideo.training.adamw import FusedAdamW

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

GRADIENT, COUNT, PERIOD = "accumulated_gradient", "accumulated_steps", "update_period"


class RampingAdamW(FusedAdamW):
    """AdamW with a number of steps between two updates, N, for each number of some parameters (algorithm 2).

    ramped: those parameters. N is 0 until it is set, which means the same as 1. Such a number changes only when N
    gradients are there: their mean enters its moments, and its learning rate is N times as large. Weight decay and the
    bias correction count every step.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, ramped: Sequence[nn.Parameter], **adamw: Any) -> None:
        super().__init__(parameters, **adamw)
        self.ramped = {id(parameter) for parameter in ramped}

    def more_states(self, parameter: nn.Parameter) -> dict[str, torch.Size]:
        is_ramped = id(parameter) in self.ramped
        return dict.fromkeys((GRADIENT, COUNT, PERIOD), parameter.shape) if is_ramped else {}

    def set_periods(self, parameter: nn.Parameter, periods: Tensor) -> None:
        """Set N for every number of a parameter."""
        self.state_of(parameter)[PERIOD].copy_(periods)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the weights. The gradients of ramped parameters are not kept."""
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and id(parameter) in self.ramped:
                    self._update(parameter, group)
                    parameter.grad = None
        super().step()

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state, (beta1, beta2), rate = self.state_of(parameter), group["betas"], group["lr"]
        updates = self.skipped(parameter.device) == 0
        state[STEP] += updates
        state[COUNT] += updates
        state[GRADIENT] += torch.where(updates, parameter.grad, 0.0)
        count, (m, v) = state[COUNT], (state[name] for name in MOMENTS)
        due = (count >= state[PERIOD]) & updates
        mean = state[GRADIENT] / count.clamp(min=1.0)
        m.copy_(torch.where(due, beta1 * m + (1 - beta1) * mean, m))
        v.copy_(torch.where(due, beta2 * v + (1 - beta2) * mean.square(), v))
        correction1, correction2 = (1 - torch.pow(beta, state[STEP].double()) for beta in (beta1, beta2))
        change = rate * count * (m / correction1.float()) / ((v / correction2.float()).sqrt() + group["eps"])
        decayed = parameter * (1 - rate * group["weight_decay"])
        parameter.copy_(torch.where(due, decayed - change, torch.where(updates, decayed, parameter)))
        for name in (GRADIENT, COUNT):
            state[name].mul_(~due)
