"""A running average of the weights, exact, in fp32."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from longvideo.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping


class ExponentialMovingAverage:
    """average <- decay * average + (1 - decay) * weight after every step, with the decay of `decay_at`.

    start: step from which weights are averaged; until then the average is the weights themselves.
    """

    def __init__(self, named_parameters: Mapping[str, nn.Parameter], decay: float, start: int = 0) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"trainer.ema_decay is {decay}; expected a number from 0 to below 1")
        self.decay, self.start = decay, start
        self.parameters = {name: p.detach() for name, p in named_parameters.items()}
        # without a decay the average is the weights themselves
        self.average = {name: p.float().clone() if decay else p.float() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after step `step` to the average."""
        decay = decay_at(self.decay, step, self.start)
        averages, weights = list(self.average.values()), [p.float() for p in self.parameters.values()]
        torch._foreach_lerp_(averages, weights, 1.0 - decay)  # pyright: ignore[reportPrivateUsage]

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Generator[None]:
        """Put the averaged weights in place inside the block; the trained ones are back, bit for bit, after it.

        Both are exchanged in place, so no second copy of all weights is needed.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for parameter, average in zip(self.parameters.values(), self.average.values(), strict=True):
            if average is not parameter:
                before = parameter.clone()
                parameter.copy_(average)
                average.copy_(before)

    @torch.no_grad()
    def put(self, name: str, value: Tensor) -> None:
        """Set the average of a parameter; without a decay it is the weight, and stays so."""
        if self.decay:
            self.average[name].copy_(value)


def decay_at(decay: float, step: int, start: int = 0) -> float:
    """Return the decay of the update after step `step`, from 0: small at first, so that early weights fade soon.

    start: step from which weights are averaged; before it the decay is 0, so the average is the weights.
    """
    averaged = step - start
    return 0.0 if averaged < 0 else min(decay, (1 + averaged) / (10 + averaged))
