"""Training in NVFP4: its configuration, and the seeds of stochastic rounding for every step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from longvideo.config.fields import Bounded, share
from longvideo.errors import ConfigError
from longvideo.kernels.nvfp4.format import Rule
from longvideo.quantization.training.layers import TrainingBackend, TrainingLayers, train_in_nvfp4
from longvideo.quantization.training.recipe import GradientRounding, TrainingRecipe
from longvideo.training.objective import seeded

if TYPE_CHECKING:
    from longvideo.checkpoint.run_checkpoint import RunState
    from longvideo.distributed import Mesh
    from longvideo.model.transformer import CausalTransformer


@dataclass(frozen=True)
class NVFP4Config(Bounded):
    """Products in 4 bits, see `longvideo.quantization.training.recipe.TrainingRecipe`.

    enabled: whether the blocks train in NVFP4.
    keep: layers of the blocks that are not quantized, by official name, `*` for anything.
    inputs: rule for the scales of inputs, such as `static6` or `adaptive`.
    weights: rule for the scales of weights, such as `static6` or `adaptive`.
    tiles: whether a scale of the weights covers a tile of 16 x 16 values rather than 16 values of a row.
    stochastic_gradients: whether gradients are rounded stochastically.
    hadamard: whether both operands of the weight gradient get a random Hadamard transform.
    until: share of all steps that round. Steps after it do not, so that a model that is not to run in 4 bits ends in
        full precision (as in arXiv 2509.25149).
    backend: `te` (TransformerEngine, on Blackwell) or `emulated`; by default the first that can run.
    """

    enabled: bool = False
    keep: list[str] = field(default_factory=list)
    inputs: Rule = Rule.ADAPTIVE
    weights: Rule = Rule.STATIC6
    tiles: bool = True
    stochastic_gradients: bool = True
    hadamard: bool = True
    until: float = share(1.0)
    backend: TrainingBackend | None = None

    def recipe(self) -> TrainingRecipe:
        return TrainingRecipe(
            inputs=self.inputs,
            weights=self.weights,
            tiles=self.tiles,
            gradients=GradientRounding.STOCHASTIC if self.stochastic_gradients else GradientRounding.NEAREST,
            hadamard_points=16 if self.hadamard else 0,
        )


ONE_SCALE = "NVFP4 uses one scale for all values that a rank computes together, so losses are comparable, not equal"


class StepRounding:
    """Rounding of a model's layers, as a function of seed, step, the first view of a pass and the place.

    place: number of the part of the views' frames that this rank holds. steps: number of steps that round; later ones
    do not.
    """

    def __init__(self, layers: TrainingLayers, *, seed: int, place: int, steps: float) -> None:
        self.layers, self.seed, self.place, self.steps = layers, seed, place, steps
        self._step = 0
        self._generator = torch.Generator()

    def begin(self, step: int) -> None:
        self._step = step
        self.layers.set_rounding(step < self.steps)

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


def prepare(
    config: NVFP4Config, transformer: CausalTransformer, *, seed: int, place: int, total_steps: int
) -> StepRounding | None:
    """Prepare a transformer, which is on its device, for training as configured; None if nothing is to round."""
    if not config.enabled:
        return None
    try:
        layers = train_in_nvfp4(transformer, config.recipe(), keep=config.keep, backend=config.backend)
    except ValueError as error:
        raise ConfigError(f"nvfp4: {error}") from error
    return StepRounding(layers, seed=seed, place=place, steps=config.until * total_steps)
