"""Distill a causal model on its own roll-outs: what the recipes of all methods have in common."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING

from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.settings import ModelSettings, check_settings, chunk_spec
from longvideo.distill.backbone import compute_dtype
from longvideo.distill.compatibility import check_same_shape
from longvideo.distill.prompts import (
    ChunkScript,
    DistillStage,
    NoiseScripts,
    RolloutSource,
    Scripts,
    ShapeWorldScripts,
    check_whole_chunks,
)
from longvideo.distill.script_sources import ScriptModel, ScriptSets, open_scripts, read_own_prompts
from longvideo.distributed import Mesh
from longvideo.errors import ConfigError
from longvideo.kernels.backends import attention_backend, product_backend
from longvideo.model.cache import CACHES, ChunkCache
from longvideo.model.config import PRESETS
from longvideo.shapeworld.captions import caption
from longvideo.shapeworld.world import Scene, sample_scenes
from longvideo.training.memory import MemoryEstimate, report_estimate
from longvideo.training.objective import compile_fact
from longvideo.training.optimizer import RateSegment
from longvideo.training.recipe import AnyObjective, AnySource, Recipe
from longvideo.training.sampling import SampleDecoder, Samples, decode_samples, sample_latents

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from longvideo.distill.config import Distillation
    from longvideo.distill.walk import VideoRequest
    from longvideo.model.transformer import CausalTransformer
    from longvideo.training.checkpoint import Checkpoint
    from longvideo.training.engine import Engine
    from longvideo.vae.autoencoder import Autoencoder

MOST_SHOWN = 8
"""Number of sample videos that are drawn."""


class DistillRecipe(Recipe[AnyObjective, AnySource]):
    """Trains a student that learns from a teacher: `longvideo distill`.

    All errors of the configuration are raised before a weight is read. A subclass sets its networks, its objective and
    its source in `build`. `clips` are the videos of every step.
    """

    def __init__(
        self, config: Distillation, device: torch.device, mesh: Mesh | None = None, *, dry_run: bool = False
    ) -> None:
        self.config, self.device, self.mesh, self.dry_run = config, device, mesh or Mesh(), dry_run
        self.folder = self.teacher_folder = None
        self.shape = PRESETS[config.preset]
        self.settings, self.spec = config.settings, chunk_spec(config.settings)
        if config.model is not None:
            self.folder = ModelFolder.open(config.model)
            self.shape = self.folder.transformer_config
            self.settings, self.spec = self.folder.settings, self.folder.spec
            check_settings(config.settings, self.settings, config.model)
        elif not dry_run:
            raise ConfigError("model is not set; expected the folder of the causal model to distill")
        for stage in config.stages:
            check_whole_chunks(stage.frames, self.spec.chunk_frames)
        if config.teacher is not None and self.folder is not None:
            self.teacher_folder = ModelFolder.open(config.teacher)
            check_same_shape(self.folder, self.teacher_folder)
        self.check()
        lines = None if self.folder is None else read_own_prompts(config)
        self.segments = [RateSegment(stage.steps, stage.learning_rate) for stage in config.stages]
        self.dtype = compute_dtype(config.trainer.precision, device)
        self._check_memory()
        self.scripts = self._open_scripts(lines)
        self.decoder = None
        if self.folder is not None and "vae" in self.folder.parts:
            self.decoder = SampleDecoder(self.folder, device=device, dtype=self.dtype)
        self.clips = self.clips_of(self.scripts.train, config.stages)
        self.build()

    @abstractmethod
    def check(self) -> None:
        """Raise the errors of the method, before a weight is read."""

    @abstractmethod
    def estimate(self, stage: DistillStage) -> MemoryEstimate:
        """Estimate the memory of a step of a stage."""

    @abstractmethod
    def build(self) -> None:
        """Load the networks; set the objective and the source."""

    @abstractmethod
    def engine(self) -> Engine:
        """Return the engine of everything that is trained."""

    @property
    @abstractmethod
    def remedy(self) -> str:
        """What to change where a step does not fit the memory of a device."""

    @property
    @abstractmethod
    def generation(self) -> ModelSettings:
        """Settings that the finished student generates with."""

    def load(self, checkpoint: Checkpoint, mesh: Mesh) -> list[str]:
        changed = checkpoint.state.changed_ranks(mesh.world, mesh.sequence)
        if changed and self.config.backbone.precision == "nvfp4":
            return [
                f"{changed}: backbone.precision=nvfp4 uses one scale for all values that a rank computes together, so"
                " losses are comparable, not equal"
            ]
        return []

    def sample(self, step: int, folder: Path) -> dict[str, float]:
        """Generate as the finished student does, draw a strip of each video, and let the judge score them."""
        from longvideo.evaluation.samples import record_samples

        config = self.config.samples
        if not config.prompts or self.decoder is None:
            return {}
        values: dict[str, float] = {}
        clips, captions, scenes = self._shown()
        for steps in config.steps:
            with self.decoder.on_device() as autoencoder:
                samples = Samples.join([self.generate(clip, autoencoder, steps) for clip in clips])
            scores = record_samples(
                samples.frames,
                samples.latents,
                captions,
                folder / f"student_{step:07d}_{steps}_steps.png",
                shown=MOST_SHOWN,
                scenes=scenes if config.judge else (),
                fps=self.settings.fps,
                decoder=self.decoder.folder,
            )
            values |= {f"{name}_{steps}": value for name, value in scores.items()}
        return values

    def generate(self, clip: VideoRequest, autoencoder: Autoencoder, steps: int) -> Samples:
        """Return samples of every video, as the finished student generates it in `steps` steps."""
        latents = sample_latents(
            self.student,
            replace(self.generation, steps=steps),
            self.spec,
            features_PJD=clip.features_PJD,
            rows_NB=clip.prompt_NB,
            cuts=clip.cuts,
            seeds=clip.samples,
            first_latent=clip.first_latent,
            cache_type=self.cache_type,
        )
        return decode_samples(autoencoder, latents)

    @property
    @abstractmethod
    def student(self) -> CausalTransformer:
        """The network that generates samples."""

    def facts(self) -> list[str]:
        backbone = self.config.backbone
        precision = backbone.formats.precision_of(packed=False)
        return [
            f"backbone {precision}: {product_backend(precision, self.device)}",
            f"KV cache: {backbone.kv_cache}",
            f"attention: {attention_backend('bf16', self.device)}",
            compile_fact(self.config.compile, self.device),
        ]

    def clips_of(self, scripts: Scripts, stages: Sequence[DistillStage]) -> RolloutSource:
        """Return videos with prompts of `scripts`."""
        return RolloutSource(
            scripts,
            stages,
            negative_prompt=self.config.negative_prompt,
            cut_prefix=self.settings.cut_prefix,
            chunk_frames=self.spec.chunk_frames,
            device=self.device,
        )

    def new_cache(self, model: CausalTransformer, batch: int) -> ChunkCache:
        return self.cache_type(model.cache_sizes(self.spec, batch=batch))

    @property
    def cache_type(self) -> type[ChunkCache]:
        return CACHES[self.config.backbone.kv_cache]

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Shape [C, T, H, W] of a chunk's latents."""
        (_, p, q), spec = self.shape.patch_size, self.spec
        return self.shape.in_channels, spec.chunk_frames, spec.grid_height * p, spec.grid_width * q

    def _open_scripts(self, lines: Sequence[tuple[str, ...]] | None) -> ScriptSets:
        if self.folder is None:
            shape = self.shape
            return ScriptSets(NoiseScripts(shape.text_len, shape.text_dim, dtype=self.dtype, device=self.device))
        model = ScriptModel(self.folder, self.latent_shape, self.device, self.dtype)
        return open_scripts(self.config, model, lines)

    def _check_memory(self) -> None:
        """Print the memory of a step before a weight is read; raise ConfigError if it cannot fit."""
        estimates = [self.estimate(stage) for stage in self.config.stages]
        report_estimate(max(estimates, key=lambda estimate: estimate.total), self.device, self.mesh, self.remedy)

    def _shown(self) -> tuple[list[VideoRequest], list[str], list[Scene]]:
        """Return what to generate, a caption for each video, and, for ShapeWorld, the scenes to judge by."""
        config = self.config.samples
        numbers = range(config.prompts)
        if not isinstance(self.scripts.train, ShapeWorldScripts):
            scripts = [self.scripts.train.draw(0, number, config.chunks) for number in numbers]
            clips = [self.clips.assemble([script], 0, [number]) for number, script in enumerate(scripts)]
            return clips, [" / ".join(dict.fromkeys(script.prompts)) for script in scripts], []
        scenes = sample_scenes(config.prompts, seed=self.config.seed, split="heldout", pair_fraction=0.5)
        prompts = [caption(scene, index) for index, scene in enumerate(scenes)]
        cuts = (True, *([False] * (config.chunks - 1)))
        scripts = [ChunkScript((prompt,) * config.chunks, cuts) for prompt in prompts]
        return [self.clips.assemble(scripts, 0, numbers)], prompts, scenes
