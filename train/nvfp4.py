"""Training in NVFP4: what a configuration says of it, and the seeds of stochastic rounding step by step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from longvideo.errors import ConfigError
from longvideo.kernels.nvfp4.format import Rule
from longvideo.model.transformer import CausalTransformer
from longvideo.quantization.convert import train_in_nvfp4
from longvideo.quantization.training import RoundingSeeds, TrainingRecipe
from longvideo.train.objective import seeded


@dataclass(frozen=True)
class NVFP4Config:
    """Products in 4 bits, see `longvideo.quantization.training.TrainingRecipe`.

    keep: layers of the blocks that stay as they are, by official name, `*` for anything.
    """

    enabled: bool = False
    keep: list[str] = field(default_factory=list)
    inputs: str = Rule.ADAPTIVE.value
    weights: str = Rule.STATIC6.value
    tiles: bool = True
    stochastic_gradients: bool = True
    hadamard: bool = True

    def __post_init__(self) -> None:
        rules = [rule.value for rule in Rule]
        for name in ("inputs", "weights"):
            if getattr(self, name) not in rules:
                raise ConfigError(f"nvfp4.{name}={getattr(self, name)!r} is unknown; use one of {', '.join(rules)}")

    def recipe(self) -> TrainingRecipe:
        return TrainingRecipe(
            inputs=Rule(self.inputs),
            weights=Rule(self.weights),
            tiles=self.tiles,
            stochastic_gradients=self.stochastic_gradients,
            hadamard=self.hadamard,
        )


class StepRounding:
    """Seeds of the stochastic rounding of a model's layers, as a function of seed, step, pass and rank."""

    def __init__(self, seeds: RoundingSeeds, *, seed: int, rank: int):
        self.seeds, self.seed, self.rank = seeds, seed, rank
        self._generator = torch.Generator()

    def begin(self, step: int) -> None:
        self.seeds.draw(seeded(self._generator, self.seed, "rounding", step, self.rank))

    def next_pass(self) -> None:
        self.seeds.advance()


def prepare(config: NVFP4Config, transformer: CausalTransformer, *, seed: int, rank: int) -> StepRounding | None:
    """Let a transformer, which is on its device, train as configured."""
    if not config.enabled:
        return None
    return StepRounding(train_in_nvfp4(transformer, config.recipe(), keep=config.keep), seed=seed, rank=rank)
