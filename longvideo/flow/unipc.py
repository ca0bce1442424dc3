"""UniPC, the few-step solver (arXiv 2302.04867): order 2, B2(h) = expm1(h), data prediction, with corrector.

Every coefficient is a number on the host, computed before the first step, so a step is a few multiply-adds, and the
host does not wait for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longvideo.errors import UserError
from longvideo.flow.schedule import NUM_TRAIN_TIMESTEPS

if TYPE_CHECKING:
    from torch import Tensor

SIGMA_START = 0.999


@dataclass(frozen=True)
class Terms:
    """Factors of one linear update.

    sample: factor of the sample. newest, last, older: factors of the data predictions of this step, of the last step
        and of the step before it.
    """

    sample: float
    newest: float = 0.0
    last: float = 0.0
    older: float = 0.0


class UniPC:
    """Integrate velocities from noise to data in `num_steps` model calls.

    sigmas: `num_steps + 1` noise levels; the last one is 0.
    timesteps: whole numbers that the model receives, as in the reference implementation.
    One solver serves any number of samples; `Trajectory` holds the state of an integration.
    Raises UserError for less than one step.
    """

    def __init__(self, num_steps: int, shift: float = 5.0) -> None:
        if num_steps < 1:
            raise UserError(f"steps is {num_steps}; expected at least 1")
        base = [SIGMA_START * (1 - i / num_steps) for i in range(num_steps)]
        self.num_steps = num_steps
        self.sigmas = [shift * s / (1 + (shift - 1) * s) for s in base] + [0.0]
        self.timesteps = [int(s * NUM_TRAIN_TIMESTEPS) for s in self.sigmas[:-1]]
        orders = [min(2, i + 1, num_steps - i) for i in range(num_steps)]
        self.predictions = [self._predictor(i, orders[i]) for i in range(num_steps)]
        self.corrections = [None] + [self._corrector(i, orders[i - 1]) for i in range(1, num_steps)]

    def start(self, noise: Tensor) -> Trajectory:
        """Return an integration that begins at pure noise."""
        return Trajectory(self, noise)

    def _lambda(self, step: int) -> float:
        sigma = self.sigmas[step]
        return math.inf if sigma == 0 else math.log(1 - sigma) - math.log(sigma)

    def _predictor(self, step: int, order: int) -> Terms:
        h = self._lambda(step + 1) - self._lambda(step)
        factor = -(1 - self.sigmas[step + 1]) * math.expm1(-h)
        sample = self.sigmas[step + 1] / self.sigmas[step]
        if order == 1:
            return Terms(sample=sample, last=factor)
        ratio = (self._lambda(step - 1) - self._lambda(step)) / h
        return Terms(sample=sample, last=factor * (1 - 0.5 / ratio), older=factor * 0.5 / ratio)

    def _corrector(self, step: int, order: int) -> Terms:
        h = self._lambda(step) - self._lambda(step - 1)
        phi1 = math.expm1(-h)
        factor = -(1 - self.sigmas[step]) * phi1
        sample = self.sigmas[step] / self.sigmas[step - 1]
        if order == 1:
            return Terms(sample=sample, newest=factor * 0.5, last=factor * 0.5)
        ratio = (self._lambda(step - 2) - self._lambda(step - 1)) / h
        phi2 = phi1 / -h - 1
        phi3 = phi2 / -h - 0.5
        first, second = phi2 / phi1, 2 * phi3 / phi1
        # [1 1; ratio 1] (rho_older, rho_newest) = (first, second)
        rho_older = (first - second) / (1 - ratio)
        rho_newest = first - rho_older
        return Terms(
            sample=sample,
            newest=factor * rho_newest,
            last=factor * (1 - rho_newest - rho_older / ratio),
            older=factor * rho_older / ratio,
        )


class Trajectory:
    """One integration. `sample` is the next input of the model, and after the last `step` the clean result."""

    def __init__(self, solver: UniPC, noise: Tensor) -> None:
        self.sample = noise
        self.step_index = 0
        self._solver = solver
        self._corrected = noise
        self._predictions: list[Tensor] = []

    def step(self, velocity: Tensor) -> Tensor:
        """Move to the next noise level with the velocity at `sample`, and return the new `sample`."""
        solver, i = self._solver, self.step_index
        x0 = self.sample - solver.sigmas[i] * velocity
        corrected = self.sample
        correct = solver.corrections[i]
        if correct is not None:
            corrected = self._combine(correct, self._corrected) + correct.newest * x0
        self._predictions = [*self._predictions[-1:], x0]
        self._corrected = corrected
        self.sample = self._combine(solver.predictions[i], corrected)
        self.step_index += 1
        return self.sample

    def replace(self, frames: slice, clean_BCTHW: Tensor) -> None:
        """Set some latent frames of `sample` to a known clean value."""
        self.sample = self.sample.clone()
        self.sample[:, :, frames] = clean_BCTHW

    def _combine(self, terms: Terms, sample: Tensor) -> Tensor:
        out = terms.sample * sample + terms.last * self._predictions[-1]
        return out + terms.older * self._predictions[-2] if terms.older else out
