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
    """average <- decay * average + (1 - decay) * weight after every step, with the decay of `decay_at`."""

    def __init__(self, named_parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"trainer.ema_decay is {decay}; expected a number from 0 to below 1")
        self.decay = decay
        self.parameters = {name: p.detach() for name, p in named_parameters.items()}
        # without a decay the average is the weights themselves
        self.average = {name: p.float().clone() if decay else p.float() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after step `step` to the average."""
        decay = decay_at(self.decay, step)
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


def decay_at(decay: float, step: int) -> float:
    """Return the decay of the update after step `step`, from 0: small at first, so that early weights fade soon."""
    return min(decay, (1 + step) / (10 + step))
