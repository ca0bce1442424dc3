"""AdamW in torch's fused form, and AdamW whose moments start again after some number of updates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longvideo.checkpoint.run_checkpoint import MOMENTS, STEP

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class FusedAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` in its fused form, which reads the attribute `found_inf` on the device.

    A step with `found_inf` above 0 changes no weight and no state, and the host does not wait for the flag.
    """

    found_inf: Tensor | None
    grad_scale: Tensor | None

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        learning_rate: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        super().__init__(parameters, lr=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self.found_inf = self.grad_scale = None

    def more_states(self, parameter: nn.Parameter) -> dict[str, torch.Size]:
        """Return the names and shapes of a parameter's states other than AdamW's."""
        del parameter
        return {}

    def skipped(self, device: torch.device) -> Tensor:
        """Return 1 if this step changes nothing, else 0."""
        return torch.zeros((), device=device) if self.found_inf is None else self.found_inf.clamp(max=1.0)

    def state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Return a parameter's state, with zeros before its first step."""
        state, device = self.state[parameter], parameter.device
        if STEP not in state:
            state[STEP] = torch.zeros((), device=device)
            state |= {name: torch.zeros_like(parameter) for name in MOMENTS}
        for name, shape in self.more_states(parameter).items():
            if name not in state:
                state[name] = torch.zeros(shape, device=device)
        return state


class ResettingAdamW(FusedAdamW):
    """AdamW whose moments and whose bias correction start again after some number of updates.

    reset_every: number of updates between two resets; 0 resets never. `step` of a parameter's state is the number of
    updates since the last one. All counts are on the device, because a skipped step does not update.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, reset_every: int, **adamw: Any) -> None:
        super().__init__(parameters, **adamw)
        self.reset_every = reset_every

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the weights. The gradients are changed in place first."""
        del closure
        for group in self.param_groups:
            for parameter in _with_gradient(group):
                self.transform(parameter, self._current_state(parameter), group)
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = self.rate(group)
        super().step()
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate

    def transform(self, parameter: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Change the gradient of a parameter in place before it enters the moments."""
        raise NotImplementedError

    def rate(self, group: dict[str, Any]) -> float | Tensor:
        """Return the learning rate of this update."""
        return group["lr"]

    def _current_state(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Return a parameter's state, reset if its updates are used up and the step is not skipped."""
        state = self.state_of(parameter)
        if self.reset_every:
            resets = (state[STEP] >= self.reset_every) & (self.skipped(parameter.device) == 0)
            torch._foreach_mul_([state[name] for name in (*MOMENTS, STEP)], (~resets).float())  # pyright: ignore
        return state


def _with_gradient(group: dict[str, Any]) -> Iterator[nn.Parameter]:
    return (parameter for parameter in group["params"] if parameter.grad is not None)
