"""Train the autoencoder on ShapeWorld: build, validate, measure latent statistics, export."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.modules import load_weights
from longvideo.checkpoint.settings import ModelSettings
from longvideo.config.fields import Bounded, bounded, seed_field, share
from longvideo.pixels import to_uint8
from longvideo.shapeworld.world import WORLD_NAME, Split, sample_scenes
from longvideo.train.shapeworld.scenes import SceneConfig, ScenePool, frame_seconds
from longvideo.train.vae.clips import ClipStage, ReconstructionSource
from longvideo.train.vae.reconstruction import Reconstruction, ReconstructionConfig, clip_psnr
from longvideo.training.objective import check_stages, compile_fact, seeded
from longvideo.training.optimizer import OptimizerConfig, RateSegment
from longvideo.training.precision import autocast
from longvideo.training.recipe import Recipe
from longvideo.training.run_folder import MODEL
from longvideo.training.trainer import TrainerConfig
from longvideo.vae.autoencoder import Autoencoder
from longvideo.vae.config import AutoencoderConfig

if TYPE_CHECKING:
    from pathlib import Path

CHUNK_FRAMES = (29, 32)
"""Number of pixel frames in a video's first chunk and in every later one."""


@dataclass(frozen=True)
class AutoencoderShape(Bounded):
    """Sizes that replace those of the preset `tiny`.

    base_dim: number of channels of the encoder's first stage.
    decoder_base_dim: number of channels of the decoder's last stage.
    z_dim: number of latent channels.
    dim_mult: channels of each stage, in multiples of the base.
    num_res_blocks: number of residual blocks of a stage.
    """

    base_dim: int | None = bounded(None, least=1)
    decoder_base_dim: int | None = bounded(None, least=1)
    z_dim: int | None = bounded(None, least=1)
    dim_mult: tuple[int, ...] | None = bounded(None, least=1)
    num_res_blocks: int | None = bounded(None, least=1)

    def build(self) -> AutoencoderConfig:
        sizes = {name: value for name, value in vars(self).items() if value is not None}
        preset = AutoencoderConfig.tiny()
        channels = sizes.get("z_dim", preset.z_dim)
        if "dim_mult" in sizes:
            sizes["dim_mult"] = tuple(sizes["dim_mult"])
        return replace(preset, **sizes, latents_mean=(0.0,) * channels, latents_std=(1.0,) * channels)


@dataclass(frozen=True)
class VaeValidationConfig(Bounded):
    """Held-out clips of two chunks, encoded and decoded as a stream.

    clips: number of clips.
    shown: number of clips that are drawn, as given and as reconstructed; 0 draws none.
    statistics_clips: number of training clips from which the mean and deviation of the latents are measured.
    batch: number of clips that are encoded together.
    """

    clips: int = bounded(32, least=1)
    shown: int = bounded(6, least=0)
    statistics_clips: int = bounded(256, least=1)
    batch: int = bounded(16, least=1)


@dataclass(frozen=True)
class VaeTraining(Bounded):
    """Configuration of `longvideo train vae`.

    seed: seed of weights, data and noise.
    initialize: model folder to take the autoencoder from; by default it starts from random weights.
    shipped: packaged models by keys such as `initialize`, used where the folder named there does not exist.
    cut_fraction: share of the clips of more than one frame that cut to another scene.
    model: sizes of the autoencoder.
    scenes: scenes that clips are rendered from.
    stages: runs of steps, one after another.
    loss: terms of the loss.
    optimizer: optimizer and its schedule.
    trainer: logs, samples and checkpoints.
    validation: held-out clips.
    """

    seed: int = seed_field()
    initialize: str | None = None
    shipped: dict[str, str] = field(default_factory=dict)
    cut_fraction: float = share(0.04)
    model: AutoencoderShape = field(default_factory=AutoencoderShape)
    scenes: SceneConfig = field(default_factory=SceneConfig)
    stages: list[ClipStage] = field(default_factory=list)
    loss: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    validation: VaeValidationConfig = field(default_factory=VaeValidationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stages(self.stages)


class VaeRecipe(Recipe[Reconstruction, ReconstructionSource]):
    """Trains the autoencoder: `longvideo train vae`."""

    def __init__(self, config: VaeTraining, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.segments = [RateSegment(stage.steps, stage.learning_rate) for stage in config.stages]
        self.autoencoder = build_autoencoder(config.model.build(), seed=config.seed, device=device)
        if config.initialize is not None:
            load_weights(
                self.autoencoder,
                ModelFolder.open(config.initialize).weights("vae"),
                device=device,
                dtype=torch.float32,
            )
        self.objective = Reconstruction(self.autoencoder, config.loss, device=device)
        self.pool = self._pool("train", config.scenes.count)
        self.source = ReconstructionSource(
            self.pool,
            config.stages,
            seed=config.seed,
            max_seconds=config.scenes.max_seconds,
            cut_fraction=config.cut_fraction,
            latent_channels=self.autoencoder.config.z_dim,
        )

    def sample(self, step: int, folder: Path) -> dict[str, float]:
        """Measure held-out clips as a stream would show them, and draw pairs of rows: given, reconstructed."""
        from longvideo.evaluation.sheet import film_strip, write_picture

        config = self.config.validation
        pool = self._pool("heldout", config.clips)
        overall, objects, rows = [], [], []
        for first in range(0, config.clips, config.batch):
            scenes = torch.arange(first, min(first + config.batch, config.clips), device=self.device)
            video, mask = self._clips(pool, scenes, stream="validation")
            output = self._stream(video)
            for ratios, values in zip((overall, objects), clip_psnr(output, video, mask), strict=True):
                ratios.append(values)
            num_shown = max(0, min(config.shown - first, len(scenes)))
            for original, reconstruction in zip(
                *(to_uint8(clips[:num_shown]).cpu().numpy() for clips in (video, output)), strict=True
            ):
                rows += [original, reconstruction]
        if rows:
            folder.mkdir(parents=True, exist_ok=True)
            captions = [f"{kind} {i}" for i in range(len(rows) // 2) for kind in ("given", "reconstructed")]
            write_picture(film_strip(rows, columns=8, captions=captions), folder / f"vae_{step:07d}.png")
        values_overall, values_objects = torch.cat(overall), torch.cat(objects)
        return {
            "val_psnr": values_overall.mean().item(),
            "val_object": values_objects.mean().item(),
            "val_object_worst": values_objects.min().item(),
        }

    def export(self, folder: Path) -> None:
        """Write `vae/` of a model folder, with the latent statistics of training clips."""
        mean, std = self._statistics()
        exported = Autoencoder(replace(self.autoencoder.config, latents_mean=mean, latents_std=std))
        exported.load_state_dict(self.autoencoder.state_dict())
        scenes = self.config.scenes
        settings = ModelSettings(height=scenes.height, width=scenes.width, trained_on=WORLD_NAME)
        ModelFolder.save(folder, settings=settings, vae=exported, overwrite=True)

    def facts(self) -> list[str]:
        return [compile_fact(self.config.loss.compile, self.device)]

    def next_steps(self, folder: Path) -> list[str]:
        model = folder / MODEL
        command = ["longvideo", "train", "ar", "tiny/ar_opening", f"vae={model}"]
        command += ["--output", str(folder.with_name(f"{folder.name}_ar"))]
        return [f"model: {model}", f"next: {shlex.join(command)}"]

    def _statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and deviation of every latent channel over training clips."""
        config = self.config.validation
        sums = torch.zeros(3, self.autoencoder.config.z_dim, dtype=torch.float64, device=self.device)
        for group, first in enumerate(range(0, config.statistics_clips, config.batch)):
            count = min(config.batch, config.statistics_clips - first)
            generator = seeded(torch.Generator(self.device), self.config.seed, "statistics", group)
            scenes = torch.randint(len(self.pool), (count,), generator=generator, device=self.device)
            video, _ = self._clips(self.pool, scenes, stream=f"statistics {group}")
            latents = torch.cat(self._encode(video), dim=2).double().transpose(0, 1).flatten(1)
            sums += torch.stack((torch.ones_like(latents), latents, latents.square())).sum(-1)
        mean = sums[1] / sums[0]
        std = (sums[2] / sums[0] - mean.square()).clamp_min(1e-8).sqrt()
        return tuple(mean.tolist()), tuple(std.tolist())

    def _pool(self, split: Split, count: int) -> ScenePool:
        config = self.config.scenes
        scenes = sample_scenes(count, seed=self.config.seed, split=split, pair_fraction=config.pair_fraction)
        return ScenePool(scenes, height=config.height, width=config.width, device=self.device)

    def _clips(self, pool: ScenePool, scene_B: Tensor, *, stream: str) -> tuple[Tensor, Tensor]:
        frames = sum(CHUNK_FRAMES)
        generator = seeded(torch.Generator(self.device), self.config.seed, stream, int(scene_B[0]))
        start = torch.rand(len(scene_B), generator=generator, device=self.device) * self.config.scenes.max_seconds
        return pool.draw(scene_B[:, None].expand(-1, frames), frame_seconds(start, frames))

    def _encode(self, video: Tensor) -> list[Tensor]:
        """Return the mean latents of a first and a second chunk."""
        state, latents = None, []
        with self._autocast():
            for chunk in video.split(list(CHUNK_FRAMES), dim=2):
                moments, state = self.autoencoder.encode(chunk, state)
                latents.append(moments.float().chunk(2, dim=1)[0])
        return latents

    def _stream(self, video: Tensor) -> Tensor:
        state, output = None, []
        for latents in self._encode(video):
            with self._autocast():
                frames, state = self.autoencoder.decode(latents, state)
            output.append(frames.float())
        return torch.cat(output, dim=2)

    def _autocast(self) -> torch.autocast:
        return autocast(self.config.trainer.precision, self.device)


def build_autoencoder(config: AutoencoderConfig, *, seed: int, device: torch.device) -> Autoencoder:
    """Build an autoencoder with random weights that depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        autoencoder = Autoencoder(config)
    return autoencoder.to(device)
