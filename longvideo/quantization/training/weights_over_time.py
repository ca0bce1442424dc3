"""What happens over time to weights that train in 4 bits: averages, a measure of oscillation, and what follows from it.

Sources: TetraJet (arXiv 2502.20853) for averages and update periods, TetraJet-v2 (arXiv 2510.27527) for resets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from longvideo.kernels.backends import nvfp4_operations
from longvideo.quantization.training.oscillation import PATHS, Paths, update_periods
from longvideo.quantization.training.recipe import WeightsOverTime
from longvideo.quantization.training.rounded_weight import rounded_weight

if TYPE_CHECKING:
    from collections.abc import Mapping

    from longvideo.distributed import Mesh
    from longvideo.quantization.training.recipe import TrainingRecipe

ROUNDING_AVERAGE = "rounding_average"
"""State of a weight: its running average, toward which Q-EMA rounds."""
FP32 = 4
"""Bytes of a number of a state."""
OSCILLATING = "oscillating"
"""Metric: share of the weights whose rounding has moved much further than they have."""


class WeightEngine(Protocol):
    """What is needed of the engine that owns the weights."""

    def replace(self, name: str, values: Tensor) -> None:
        """Set a parameter to the values that are not NaN. Every rank calls it with the same values."""
        ...

    def set_periods(self, name: str, periods: Tensor) -> None:
        """Set the numbers of gradients of an update of a parameter, 1 or more for each of its numbers."""
        ...


def state_bytes(recipe: TrainingRecipe, num_weights: int, *, ranks: int) -> float:
    """Return the bytes that the states of weights take on a rank, those of `RampingAdamW` included."""
    averages = FP32 if recipe.weights_over_time is WeightsOverTime.Q_EMA else 0
    ramping = 3 * FP32 if recipe.weights_over_time is WeightsOverTime.Q_RAMPING else 0
    paths = len(PATHS) * FP32 / ranks if recipe.measures_oscillation else 0
    return num_weights * (averages + ramping + paths)


class Moment(NamedTuple):
    """What a step is for a measurement. measures: it belongs to one. ends: one ends. begins: one begins after it."""

    measures: bool
    ends: bool
    begins: bool


class WeightHistory:
    """The states of all weights that train in 4 bits, by the names of their parameters, and their use after each step.

    A measurement covers the last `oscillation_steps` of every `oscillation_every` steps, from step `start` on. At its
    end `reset` sets the weights with R >= `oscillation_bound` to their rounded values, the centers of their bins, and
    `q-ramping` sets the update periods that hold until the next measurement, during which they are 1.

    weights: weights by name. mesh: ranks that hold the same weights; each measures its share of them. start: first step
    after the warm-up of the learning rate.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], recipe: TrainingRecipe, *, mesh: Mesh, start: int) -> None:
        self.weights, self.recipe, self.mesh, self.start = dict(weights), recipe, mesh, start
        own = list(self.weights)[mesh.rank :: mesh.world] if recipe.measures_oscillation else []
        self.paths = {name: Paths(self.weights[name].shape, self.weights[name].device) for name in own}
        self.averages: dict[str, Tensor] = {}
        if recipe.weights_over_time is WeightsOverTime.Q_EMA:
            self.averages = {name: weight.detach().float().clone() for name, weight in weights.items()}
        self._measured: set[str] = set()
        self._rounds = True

    def begin(self, *, rounds: bool) -> None:
        """Prepare a step. rounds: whether the layers round their weights in it; otherwise nothing is measured."""
        self._rounds = rounds

    @property
    def setting(self) -> str:
        """The setting that needs these states, for messages."""
        return f"products.parts.weights_over_time={self.recipe.weights_over_time.value}"

    @property
    def ramped(self) -> list[nn.Parameter]:
        """Parameters whose numbers have update periods."""
        is_used = self.recipe.weights_over_time is WeightsOverTime.Q_RAMPING
        return list(self.weights.values()) if is_used else []

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shapes of all states, by NAME/KIND."""
        kinds = [ROUNDING_AVERAGE] * bool(self.averages) + list(PATHS) * self.recipe.measures_oscillation
        return {f"{name}/{kind}": weight.shape for name, weight in self.weights.items() for kind in kinds}

    def whole(self, name: str, kind: str) -> Tensor:
        """Return a state of a weight. Every rank calls it."""
        if kind == ROUNDING_AVERAGE:
            return self.averages[name]
        return self._of_owner(name, self.paths[name].states[kind] if name in self.paths else None)

    def put(self, name: str, kind: str, value: Tensor) -> None:
        """Set a state of a weight from a checkpoint."""
        if kind == ROUNDING_AVERAGE:
            self.averages[name].copy_(value)
        elif name in self.paths:
            self.paths[name].states[kind].copy_(value)
            self._measured.add(name)

    def weight_loaded(self, name: str) -> None:
        """Let the average of a weight start at the value that it was set to."""
        if name in self.averages:
            self.averages[name].copy_(self.weights[name].detach())

    @torch.no_grad()
    def after_step(self, step: int, skipped: Tensor, engine: WeightEngine) -> dict[str, Tensor]:
        """Follow the weights after a step; return metrics. skipped: 1 for a step that changed nothing, else 0."""
        for name, average in self.averages.items():
            weight = self.weights[name].float()
            rate = (1 - self.recipe.average_decay) * (skipped == 0).float()
            average.add_(rate * (weight - average))
        if not self.recipe.measures_oscillation:
            return {}
        device = skipped.device
        totals = torch.zeros(2, device=device)
        done = step + 1 - self.start
        if done >= 0:
            every, measured = self.recipe.oscillation_every, self.recipe.measured_steps
            moment = Moment(
                measures=self._rounds and (done + measured - 1) % every < measured,
                ends=done > 0 and done % every == 0,
                begins=self._rounds and (done + measured) % every == 0,
            )
            for name in self.weights:
                totals += self._follow(name, engine, moment)
        return {OSCILLATING: totals}

    def _follow(self, name: str, engine: WeightEngine, moment: Moment) -> Tensor:
        """Measure a weight, and act on its measurement; return the number of oscillating weights and that of all."""
        weight, paths = self.weights[name], self.paths.get(name)
        totals, ratios = torch.zeros(2, device=weight.device), None
        if paths is not None and name in self._measured and moment.measures:
            rounded = self._rounded(name)
            paths.add(weight.detach(), rounded)
            if moment.ends:
                ratios = paths.ratios()
                count = (ratios >= self.recipe.oscillation_bound).sum()
                totals = torch.stack((count, torch.full_like(count, ratios.numel()))).float()
        if moment.ends:
            self._act(name, engine, ratios)
            self._measured.discard(name)
        if moment.begins:
            if self.ramped:
                engine.set_periods(name, torch.ones_like(weight))
            if paths is not None:
                paths.begin(weight.detach(), self._rounded(name))
                self._measured.add(name)
        return totals

    def _act(self, name: str, engine: WeightEngine, ratios: Tensor | None) -> None:
        """Reset oscillating numbers of a weight, or set their update periods, on all ranks."""
        recipe = self.recipe
        if recipe.weights_over_time is WeightsOverTime.RESET:
            values = None
            if ratios is not None:
                values = torch.where(
                    ratios >= recipe.oscillation_bound, self.paths[name].states["last_rounded"], torch.nan
                )
            engine.replace(name, self._of_owner(name, values, missing=torch.nan))
        elif recipe.weights_over_time is WeightsOverTime.Q_RAMPING:
            periods = None
            if ratios is not None:
                periods = update_periods(
                    ratios, unit=recipe.ramping_unit, gain=recipe.ramping_gain, most=recipe.ramping_most
                )
            engine.set_periods(name, self._of_owner(name, periods, missing=1.0))

    def _of_owner(self, name: str, value: Tensor | None, missing: float = 0.0) -> Tensor:
        """Return the tensor of the rank that measures a weight, on all ranks; `missing` everywhere if it has none."""
        shape, device = self.weights[name].shape, self.weights[name].device
        if value is not None:
            value = value.clone()
        else:
            value = torch.full(shape, missing if name in self.paths else 0.0, device=device)
        return self.mesh.sum(value)

    def _rounded(self, name: str) -> Tensor:
        weight = self.weights[name].detach()
        average = self.averages.get(name, weight.new_empty(0))
        exact = rounded_weight(nvfp4_operations(weight.device), weight, average, self.recipe, torch.float32)
        return exact.values * exact.tensor_scale
