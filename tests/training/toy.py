"""The smallest thing a trainer can run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from longvideo.distributed import Mesh
from longvideo.training.engine import LocalEngine
from longvideo.training.objective import Objective, ratio, seeded
from longvideo.training.optimizer import OptimizerConfig, RateSegment
from longvideo.training.recipe import Recipe
from longvideo.training.trainer import Trainer, TrainerConfig

CPU = torch.device("cpu")


class Regression(Objective):
    """Learn a fixed linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        nn.init.constant_(self.linear.weight, 0.1)
        nn.init.zeros_(self.linear.bias)
        self.target = torch.linspace(-1, 1, 32).view(4, 8)

    def forward(self, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        error = (self.linear(batch) - batch @ self.target.T).square().mean(1)
        return error.mean(), {"worst": error.max(), "weighted": ratio(error.sum(), torch.tensor(2.0 * len(error)))}


class Numbers:
    unit = "row"

    def __init__(self, bad_steps: frozenset[int] = frozenset(), factor: float = float("nan")) -> None:
        """factor: what the inputs of bad steps are multiplied by."""
        self.bad_steps, self.factor = bad_steps, factor

    def passes(self, _mesh: Mesh, _micro_batch: int | None) -> int:
        return 1

    def shares(self, step: int, _mesh: Mesh, _micro_batch: int | None) -> list[Tensor]:
        batch = torch.randn(16, 8, generator=seeded(torch.Generator(), 0, step))
        return [batch * self.factor if step in self.bad_steps else batch]

    def size(self, _step: int) -> int:
        return 16


class ToyRecipe(Recipe[Regression, Numbers]):
    def __init__(self, segments: Sequence[RateSegment], source: Numbers) -> None:
        self.objective = Regression()
        self.source = source
        self.segments = segments

    def sample(self, step: int, folder: Path) -> dict[str, float]:
        del folder
        return {"half_step": step / 2}

    def next_steps(self, folder: Path) -> list[str]:
        return [f"model: {folder / 'model'}"]

    def export(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(self.objective.state_dict()), folder / "model.safetensors")


def toy_trainer(
    folder: Path,
    *steps: int,
    bad_steps: frozenset[int] = frozenset(),
    bad_factor: float = float("nan"),
    **config: Any,
) -> Trainer:
    """Build a trainer over segments of these numbers of steps. bad_factor: factor of the inputs of bad steps."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = TrainerConfig(**({"precision": "fp32", "log_every": 5, "save_every": 10, "ema_decay": 0.9} | config))
    optimizer = OptimizerConfig(learning_rate=0.03, warmup_steps=5)
    recipe = ToyRecipe([RateSegment(count) for count in steps], Numbers(bad_steps, bad_factor))
    engine = LocalEngine(
        recipe.objective,
        optimizer,
        precision="fp32",
        device=CPU,
        ema_decay=settings.ema_decay,
        spike_factor=settings.spike_factor,
    )
    return Trainer(recipe, engine, folder, config=settings, optimizer=optimizer, device=CPU)
