"""Adaptive coreset selection: train on the clips on which rounding to 4 bits matters most (ACS, arXiv 2306.07215).

The score of a clip is b |p_q - y| + (1 - b) |p_q - p| with b = cos(pi t / 2E): p_q and p are the velocities with and
without 4-bit products, y is the target, t the epoch and E the number of epochs. Velocities take the place
of the paper's class probabilities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from longvideo.config.fields import Bounded, bounded
from longvideo.quantization.training.phase import TrainingPhase
from longvideo.training.objective import seeded
from longvideo.training.precision import TrainingPrecision, autocast

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from longvideo.distributed import Mesh
    from longvideo.train.batch import ViewBatch
    from longvideo.train.teacher_forcing import TeacherForcing

SELECTION = "coreset"
"""Name of the selection in a checkpoint: the number of its period, and the clips."""


@dataclass(frozen=True)
class CoresetConfig(Bounded):
    """Which clips a training in 4 bits sees.

    share: share of the clips to train on, those with the highest scores; 1 selects nothing.
    renew_every: number of epochs of the selected clips between two selections. For each, all clips pass through the
        model twice, without gradients.
    """

    share: float = bounded(1.0, above=0, most=1)
    renew_every: int = bounded(1, least=1)


def scores(error_norms: Tensor, rounding_norms: Tensor, progress: float) -> Tensor:
    """Return b |p_q - y| + (1 - b) |p_q - p|. progress: t / E, the finished share of the epochs."""
    weight = math.cos(math.pi / 2 * min(1.0, progress))
    return weight * error_norms + (1 - weight) * rounding_norms


def best(scores_N: Tensor, count: int) -> list[int]:
    """Return the numbers of the clips with the highest scores, the first of equal ones, in ascending order."""
    values = scores_N.tolist()
    ranked = sorted(range(len(values)), key=lambda clip: (-values[clip], clip))
    return sorted(ranked[:count])


class Coreset:
    """The selected clips as a function of the place of a view among all views of the run.

    num_clips: number of all clips. num_views: number of views of the run. norms: computes both norms of every clip,
    equal on all ranks, which call it together.
    """

    def __init__(
        self,
        config: CoresetConfig,
        *,
        num_clips: int,
        num_views: int,
        seed: int,
        norms: Callable[[], tuple[Tensor, Tensor]],
    ) -> None:
        self.size = max(1, round(config.share * num_clips))
        self.period = self.size * config.renew_every
        self.epochs = num_views / self.size
        self.renew_every, self.seed, self.norms = config.renew_every, seed, norms
        self._selected: dict[int, list[int]] = {}

    def covers(self, last: int) -> bool:
        """Return whether the clips up to the view at place `last` are selected."""
        return last // self.period in self._selected

    def prepare(self, first: int, last: int) -> None:
        """Select clips for the views at these places, with the weights of now. Every rank calls it."""
        missing = [k for k in range(first // self.period, last // self.period + 1) if k not in self._selected]
        norms = self.norms() if missing else None
        for period in missing:
            assert norms is not None
            progress = period * self.renew_every / self.epochs
            self._selected[period] = best(scores(*norms, progress), self.size)
        self._selected = {period: clips for period, clips in self._selected.items() if period >= first // self.period}

    def clip(self, place: int) -> int:
        """Return the clip of a view; an epoch shows every selected clip once, in a new order."""
        epoch, within = divmod(place, self.size)
        generator = seeded(torch.Generator(), self.seed, "coreset epoch", epoch)
        order = torch.randperm(self.size, generator=generator)
        return self._selected[place // self.period][int(order[within])]

    def state(self) -> dict[str, Tensor]:
        """Return the newest selection for a checkpoint."""
        if not self._selected:
            return {}
        period = max(self._selected)
        return {SELECTION: torch.tensor([period, *self._selected[period]])}

    def load(self, stored: Tensor) -> str | None:
        """Restore what `state` returned; return a line if the selection is of other settings, and select again."""
        period, *clips = stored.tolist()
        if len(clips) != self.size:
            return f"the checkpoint's coreset has {len(clips)} clips, this one {self.size}: it is selected again"
        self._selected = {period: clips}
        return None


class ScoringSource(Protocol):
    """Batches that show every clip once."""

    def shares(self, step: int, mesh: Mesh, micro_batch: int | None) -> Sequence[ViewBatch]: ...

    def clip_of(self, step: int, view: int) -> int:
        """Return the number of the clip of a view."""
        ...


@torch.no_grad()
def velocity_norms(
    objective: TeacherForcing,
    source: ScoringSource,
    *,
    num_clips: int,
    mesh: Mesh,
    precision: TrainingPrecision,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return |p_q - y| and |p_q - p| of every clip, [N] each, equal on all ranks.

    source: batches of one view for each replica. Noise is a function of the seed and the clip's place in the source.
    """
    assert objective.rounding is not None
    layers = objective.rounding.layers
    squares = torch.zeros(2, num_clips, device=device)
    for step in range(-(-num_clips // mesh.replicas)):
        (batch,) = source.shares(step, mesh, 1)
        # the last batch shows some clips again, since all ranks compute together
        counts = float(step * mesh.replicas + mesh.replica < num_clips)
        velocities = []
        for phase in (TrainingPhase.BOTH, TrainingPhase.NEITHER):
            layers.set_phase(phase)
            with autocast(precision, device):
                velocity, target = objective.predict(batch)
            velocities.append(velocity.float())
        rounded, plain = velocities
        mask = batch.loss_mask[:, None, :, None, None]
        for row, difference in enumerate((rounded - target, rounded - plain)):
            squares[row, source.clip_of(step, mesh.replica)] += counts * (difference * mask).square().sum()
    norms = mesh.sum(squares).sqrt()
    return norms[0], norms[1]
