"""The base class of everything that a trainer can train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

from longvideo.training.objective import BatchSource, Objective

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from longvideo.distributed import Mesh
    from longvideo.training.checkpoint import Checkpoint
    from longvideo.training.optimizer import RateSegment

AnyObjective = TypeVar("AnyObjective", bound=Objective)
AnySource = TypeVar("AnySource", bound=BatchSource)


class Recipe(Generic[AnyObjective, AnySource]):
    """What is trained, on which batches, and what is written of it. A subclass sets the attributes and writes `export`.

    objective: loss as a function of a batch. source: batches as a function of the step. segments: steps of the run and
    their learning rates. In `validate`, `sample` and `export` the averaged weights are in place.
    """

    objective: AnyObjective
    source: AnySource
    segments: Sequence[RateSegment]

    def start(self, step: int) -> None:
        """Prepare the batch of `step`, the first one of this process."""

    def flops(self, step: int) -> float | None:
        """Return the operations that a step over all ranks needs at least, or None where they are not counted."""

    def state(self) -> dict[str, Tensor]:
        """Return what this rank needs besides weights to resume bit for bit; batches are a function of the step."""
        return {}

    def load(self, checkpoint: Checkpoint, mesh: Mesh) -> list[str]:
        """Restore what `state` returned on all ranks that wrote a checkpoint; return lines to print about it.

        mesh: the ranks that resume; their number may differ.
        """
        del checkpoint, mesh
        return []

    def validate(self) -> dict[str, float]:
        """Return losses on held-out data. All ranks call it together."""
        return {}

    def sample(self, step: int, folder: Path) -> dict[str, float]:
        """Draw samples of the model into `folder`; return validation numbers. Only the main rank calls it."""
        del step, folder
        return {}

    def export(self, folder: Path) -> None:
        """Write the model as a model folder. Only the main rank calls it."""
        raise NotImplementedError

    def facts(self) -> list[str]:
        """Return parts of the start line of a run: attention, number formats, compilation."""
        return []

    def next_steps(self, folder: Path) -> list[str]:
        """Return lines that name what a finished run has left in its folder, and the command to run next."""
        del folder
        return []
