"""The smallest thing a trainer can run, and small ShapeWorld parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from longvideo.train.engine import LocalEngine
from longvideo.train.mesh import Mesh
from longvideo.train.objective import Objective, ratio, seeded
from longvideo.train.optimizer import OptimizerConfig, RateSegment
from longvideo.train.scenes import ScenePool, sample_scenes
from longvideo.train.trainer import Trainer, TrainerConfig
from longvideo.train.vae import AutoencoderShape, build_autoencoder
from longvideo.vae.autoencoder import Autoencoder

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

    def __init__(self, bad_steps: frozenset[int] = frozenset(), factor: float = float("nan")):
        """factor: what the inputs of bad steps are multiplied by."""
        self.bad_steps, self.factor = bad_steps, factor

    def passes(self, mesh: Mesh, micro_batch: int | None) -> int:
        return 1

    def shares(self, step: int, mesh: Mesh, micro_batch: int | None) -> list[Tensor]:
        batch = torch.randn(16, 8, generator=seeded(torch.Generator(), 0, step))
        return [batch * self.factor if step in self.bad_steps else batch]

    def size(self, step: int) -> int:
        return 16


class ToyRecipe:
    def __init__(self, segments: Sequence[RateSegment], source: Numbers):
        self.objective = Regression()
        self.source = source
        self.segments = segments

    def start(self, step: int) -> None: ...

    def flops(self, step: int) -> float | None:
        return None

    def validate(self) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None: ...

    def sample(self, step: int, folder: Path) -> dict[str, float]:
        return {"half_step": step / 2}

    def export(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(self.objective.state_dict()), folder / "model.safetensors")


def toy_trainer(
    folder: Path,
    *steps: int,
    bad_steps: frozenset[int] = frozenset(),
    bad_factor: float = float("nan"),
    **config,
) -> Trainer:
    """Build a trainer over segments of so many steps. bad_factor: what the inputs of bad steps are multiplied by."""
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


def small_pool(count: int = 12, *, height: int = 32, width: int = 64) -> ScenePool:
    scenes = sample_scenes(count, seed=0, split="train", pair_fraction=0.5)
    return ScenePool(scenes, height=height, width=width, device=CPU)


def small_autoencoder() -> Autoencoder:
    shape = AutoencoderShape(base_dim=8, decoder_base_dim=8, z_dim=4)
    return build_autoencoder(shape.build(), seed=0, device=CPU)


@dataclass(frozen=True)
class Toy:
    """Overrides that make the packaged configurations run in seconds."""

    vae: tuple[str, ...] = (
        "stages=[{frames: 5, height: 32, width: 32, batch: 2, steps: 4}]",
        "model.base_dim=8",
        "model.decoder_base_dim=8",
        "model.z_dim=4",
        "scenes.count=12",
        "scenes.height=32",
        "scenes.width=64",
        "validation.clips=2",
        "validation.shown=1",
        "validation.batch=2",
        "validation.statistics_clips=2",
        "trainer.precision=fp32",
        "trainer.log_every=2",
        "trainer.sample_every=0",
    )
    ar: tuple[str, ...] = (
        "stages=[{steps: 2, chunks: 1, batch: 3}, {steps: 2, chunks: 3, batch: 2}]",
        "model.num_attention_heads=2",
        "model.attention_head_dim=12",
        "model.ffn_dim=32",
        "model.num_layers=2",
        "model.text_len=48",
        "scenes.count=12",
        "scenes.height=32",
        "scenes.width=64",
        "settings.height=32",
        "settings.width=64",
        "settings.steps=2",
        "bank.clips=8",
        "bank.chunks=4",
        "bank.late_fraction=0.4",
        "bank.initial_clips=4",
        "bank.group=2",
        "bank.refresh_every=2",
        "rollout.prompts=2",
        "rollout.shown=1",
        "rollout.chunks=2",
        "trainer.precision=fp32",
        "trainer.log_every=2",
        "trainer.sample_every=0",
    )
