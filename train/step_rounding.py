"""What the products of a model's layers do in every step: their phase, and the seeds of stochastic rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from longvideo.quantization.training.phase import TrainingPhase
from longvideo.training.objective import seeded

if TYPE_CHECKING:
    from longvideo.checkpoint.run_checkpoint import RunState
    from longvideo.distributed import Mesh
    from longvideo.quantization.training.layers import TrainingLayers

ONE_SCALE = "NVFP4 uses one scale for all values that a rank computes together, so losses are comparable, not equal"


@dataclass(frozen=True)
class Phases:
    """Phase of every step: both passes are in low precision until `steps`, and `tail` is the phase of later steps."""

    steps: float
    tail: TrainingPhase = TrainingPhase.NEITHER

    def at(self, step: int) -> TrainingPhase:
        return TrainingPhase.BOTH if step < self.steps else self.tail


class StepRounding:
    """Rounding of a model's layers, as a function of seed, step, the first view of a pass and the place.

    place: number of the part of the views' frames that this rank holds. description: products of the blocks, for the
    start line of a run.
    """

    def __init__(self, layers: TrainingLayers, phases: Phases, *, seed: int, place: int, description: str = "") -> None:
        self.layers, self.phases, self.seed, self.place = layers, phases, seed, place
        self.description = description
        self._step = 0
        self._generator = torch.Generator()

    def begin(self, step: int) -> None:
        self._step = step
        self.layers.set_phase(self.phases.at(step))

    def next_pass(self, first_view: int) -> None:
        """Draw the seeds of a pass. first_view: number of its first view in the batch of the step."""
        if self.layers.seeds is not None:
            parts = (self.seed, "rounding", self._step, first_view, self.place)
            self.layers.seeds.draw(seeded(self._generator, *parts))

    def note(self, written: RunState, mesh: Mesh) -> str | None:
        """Return why losses after a resume differ from those of an uninterrupted run, or None if they do not."""
        if self.layers.seeds is None:
            return "TransformerEngine rounds with its own random numbers: losses are comparable, not equal"
        if changed := written.changed_ranks(mesh.world, mesh.sequence):
            return f"{changed}: {ONE_SCALE}"
        return None
