"""What the products of a model's layers do in every step: their phase, and the seeds of stochastic rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.errors import CheckpointError
from longvideo.quantization.training.fp8 import next_step
from longvideo.quantization.training.phase import TrainingPhase
from longvideo.training.objective import seeded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longvideo.checkpoint.run_checkpoint import RunState
    from longvideo.checkpoint.tensors import Weights
    from longvideo.distributed import Mesh
    from longvideo.quantization.training.layers import TrainingLayers
    from longvideo.quantization.training.weights_over_time import WeightHistory

AMAXES = "fp8_amaxes"
ONE_SCALE = "a tensor's scale is that of all values that a rank computes together, so losses are comparable, not equal"


@dataclass(frozen=True)
class Phases:
    """Phase of every step: both passes are in low precision until `steps`, and `tail` is the phase of later steps."""

    steps: float
    tail: TrainingPhase = TrainingPhase.NEITHER

    def at(self, step: int) -> TrainingPhase:
        return TrainingPhase.BOTH if step < self.steps else self.tail


class StepRounding:
    """Rounding of a model's layers, as a function of seed, step, the first view of a pass and the place.

    mesh: the ranks of the run. description: products of the blocks, for the start line of a run. history: states of
    the weights that train in 4 bits, if a part of the recipe needs some.
    """

    def __init__(
        self,
        layers: TrainingLayers,
        phases: Phases,
        *,
        seed: int,
        mesh: Mesh,
        description: str = "",
        history: WeightHistory | None = None,
    ) -> None:
        self.layers, self.phases, self.seed, self.mesh = layers, phases, seed, mesh
        self.description, self.history = description, history
        self.delayed = layers.delayed
        self._step = 0
        self._generator = torch.Generator()

    def begin(self, step: int) -> None:
        self._step = step
        phase = self.phases.at(step)
        self.layers.set_phase(phase)
        if self.history is not None:
            self.history.begin(rounds=phase is TrainingPhase.BOTH)
        if self.delayed:
            amaxes = self._amaxes()
            # a magnitude that is not finite would spoil the steps after it
            of_step = amaxes[..., 0].nan_to_num(0.0, 0.0, 0.0)
            amaxes[..., 0] = self.mesh.largest_on_device(of_step)
            self._set_amaxes(next_step(amaxes))

    def next_pass(self, first_view: int) -> None:
        """Draw the seeds of a pass. first_view: number of its first view in the batch of the step."""
        if self.layers.seeds is not None:
            parts = (self.seed, "rounding", self._step, first_view, self.mesh.place)
            self.layers.seeds.draw(seeded(self._generator, *parts))

    def state(self) -> dict[str, Tensor]:
        """Return the largest magnitudes of delayed scaling, equal on all ranks after each step has begun."""
        return {AMAXES: self._amaxes()} if self.delayed else {}

    def load(self, written: RunState, states: Sequence[Weights]) -> list[str]:
        """Restore what `state` returned on each rank; return why losses differ from those of an uninterrupted run.

        written: state of the checkpoint. states: tensors of the ranks that wrote it. Raises CheckpointError for the
        magnitudes of other layers, or of histories of another length.
        """
        notes: list[str] = []
        if self.delayed:
            stored = [state.read(AMAXES) for state in states if AMAXES in state.infos]
            if stored:
                self._check(stored[0].shape)
                # those of the last step are of each rank alone
                self._set_amaxes(torch.stack(stored).amax(0))
            else:
                notes.append("the checkpoint has no magnitudes of FP8: the histories of delayed scaling start empty")
        if self.layers.nvfp4 and self.layers.seeds is None:
            notes.append("TransformerEngine rounds with its own random numbers: losses are comparable, not equal")
        elif changed := written.changed_ranks(self.mesh.world, self.mesh.sequence):
            notes.append(f"{changed}: {ONE_SCALE}")
        return notes

    def _check(self, stored: torch.Size) -> None:
        expected = self._amaxes().shape
        if stored != expected:
            raise CheckpointError(
                f"the checkpoint's magnitudes of FP8 have shape {list(stored)}; expected {list(expected)} [layers,"
                " operands, steps]; resume with the products.keep that it was saved with"
            )

    def _amaxes(self) -> Tensor:
        return torch.stack([layer.amaxes for layer in self.delayed])

    def _set_amaxes(self, amaxes: Tensor) -> None:
        for layer, own in zip(self.delayed, amaxes, strict=True):
            layer.set_amaxes(own)
