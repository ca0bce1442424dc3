"""Distill a causal model into one of few steps: the recipe that the trainer runs."""

from __future__ import annotations

import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from longvideo.checkpoint.adapters import Adapter
from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.settings import ModelSettings, check_settings, chunk_spec
from longvideo.data.encoded import EncodedDataset
from longvideo.distill.backbone import compile_blocks, compute_dtype, load_backbone, set_student
from longvideo.distill.compatibility import check_adapter, check_same_shape
from longvideo.distill.engine import PairedEngine
from longvideo.distill.memory import adapter_parameters, estimate_memory
from longvideo.distill.merging import save_merged
from longvideo.distill.objectives import CriticObjective, NoisyCopies, RoleObjective, StudentObjective
from longvideo.distill.prompts import (
    SHAPEWORLD,
    ChunkScript,
    ClipScripts,
    DistillStage,
    FileScripts,
    NoiseScripts,
    RolloutSource,
    Scripts,
    ShapeWorldScripts,
    check_whole_chunks,
    encode_all,
    read_scripts,
)
from longvideo.distill.roles import LoraRoles, Role
from longvideo.distill.self_forcing import SelfForcing
from longvideo.distributed import Mesh, divide_batch
from longvideo.errors import ConfigError
from longvideo.flow.unipc import UniPC
from longvideo.kernels.backends import attention_backend, product_backend
from longvideo.machine.launcher import launched
from longvideo.model.cache import CACHES, ChunkCache
from longvideo.model.conditioning import chunk_text
from longvideo.model.config import PRESETS
from longvideo.rollout import context_level
from longvideo.shapeworld.captions import caption
from longvideo.shapeworld.world import Scene, sample_scenes
from longvideo.training.memory import BlockMemory, MemoryEstimate, engine_memory, report_estimate
from longvideo.training.objective import compile_fact
from longvideo.training.optimizer import OptimizerConfig, RateSegment, rate_schedule
from longvideo.training.recipe import Recipe
from longvideo.training.run import new_engine
from longvideo.training.run_folder import LORA, MODEL, describe_model
from longvideo.training.sampling import SampleDecoder, Samples, decode_samples, sample_latents

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from longvideo.distill.config import Distillation
    from longvideo.distill.walk import VideoRequest
    from longvideo.model.transformer import CausalTransformer
    from longvideo.training.checkpoint import Checkpoint
    from longvideo.training.engine import Engine
    from longvideo.vae.autoencoder import Autoencoder

MOST_SHOWN = 8
"""Number of sample videos that are drawn."""


class DistillRecipe(Recipe[StudentObjective, RolloutSource]):
    """Trains a student and a critic on one frozen backbone: `longvideo distill`.

    All errors of the configuration are raised before a weight is read.
    """

    def __init__(
        self, config: Distillation, device: torch.device, mesh: Mesh | None = None, *, dry_run: bool = False
    ) -> None:
        self.config, self.device, self.dry_run = config, device, dry_run
        self.folder = None
        self.shape = PRESETS[config.preset]
        self.settings, self.spec = config.settings, chunk_spec(config.settings)
        if config.model is not None:
            self.folder = ModelFolder.open(config.model)
            self.shape = self.folder.transformer_config
            self.settings, self.spec = self.folder.settings, self.folder.spec
            check_settings(config.settings, self.settings, config.model)
        elif not dry_run:
            raise ConfigError("model is not set; expected the folder of the causal model to distill")
        teacher_folder = None
        adapter = None if config.adapter is None else Adapter.load(Path(config.adapter))
        for stage in config.stages:
            check_whole_chunks(stage.frames, self.spec.chunk_frames)
        if config.teacher is not None and self.folder is not None:
            teacher_folder = ModelFolder.open(config.teacher)
            check_same_shape(self.folder, teacher_folder)
        if adapter is not None:
            check_adapter(adapter, config.lora, self.shape, config.model or "", config.adapter or "")
        own_prompts = self.folder is not None and config.data is None and config.prompts != SHAPEWORLD
        scripts = read_scripts(Path(config.prompts), config.negative_prompt) if own_prompts else None
        self.segments = [RateSegment(stage.steps, stage.learning_rate) for stage in config.stages]
        self.dtype = compute_dtype(config.trainer.precision, device)
        self._check_memory(mesh or Mesh())
        self.scripts = self._scripts(scripts)
        self.decoder = None
        if self.folder is not None and "vae" in self.folder.parts:
            self.decoder = SampleDecoder(self.folder, device=device, dtype=self.dtype)
        student = self._backbone(self.folder)
        teacher = None if config.teacher is None else self._backbone(teacher_folder)
        self.roles = LoraRoles(
            student, config.lora, teacher=teacher, new_cache=partial(self._new_cache, student), seed=config.seed
        )
        if adapter is not None:
            set_student(adapter, self.roles)
        if config.compile and device.type == "cuda":
            compile_blocks(student, teacher)
        teacher_settings = self.settings if teacher_folder is None else teacher_folder.settings
        self.objective, self.critic = self._objectives(teacher_settings)
        self.source = RolloutSource(
            self.scripts,
            config.stages,
            negative_prompt=config.negative_prompt,
            cut_prefix=self.settings.cut_prefix,
            chunk_frames=self.spec.chunk_frames,
            device=device,
        )

    def load(self, checkpoint: Checkpoint, mesh: Mesh) -> list[str]:
        changed = checkpoint.state.changed_ranks(mesh.world, mesh.sequence)
        if changed and self.config.backbone.precision == "nvfp4":
            return [
                f"{changed}: backbone.precision=nvfp4 uses one scale for all values that a rank computes together, so"
                " losses are comparable, not equal"
            ]
        return []

    def engine(self, mesh: Mesh) -> PairedEngine:
        """Return the engines of student and critic as one."""
        config = self.config
        passes = self.source.passes(mesh, config.parallel.micro_batch) if launched() else 1

        def new(objective: RoleObjective, optimizer: OptimizerConfig, ema_decay: float) -> Engine:
            self.roles.switch(objective.role)  # only the weights of the active role can have gradients
            # adapters are fp32 and compute in the dtype of their input, so nothing is cast
            trainer = replace(config.trainer, precision="fp32", ema_decay=ema_decay)
            return new_engine(
                objective, optimizer, trainer, config.parallel, mesh=mesh, device=self.device, passes=passes
            )

        return PairedEngine(
            (self.objective, new(self.objective, config.optimizer, config.trainer.ema_decay)),
            (self.critic, new(self.critic, config.critic_optimizer, 0.0)),
            critic_rate=rate_schedule(config.critic_optimizer, [RateSegment(s.steps) for s in config.stages]),
            student_every=config.student_every,
            critic_first=0 if self.dry_run else config.critic_first,
        )

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

    def export(self, folder: Path) -> None:
        """Write the student's adapter next to the model folder, and that folder too unless `merge` is false."""
        assert self.folder is not None, "a dry run exports nothing"
        adapter = self.adapter()
        adapter.save(folder.parent / LORA, base=str(self.config.model))
        if self.config.merge:
            save_merged(
                self.folder.with_adapters([adapter.stored()]),
                folder,
                steps=self.generation.steps,
                clean_pass=self.generation.clean_pass,
                overwrite=True,
            )

    def facts(self) -> list[str]:
        backbone = self.config.backbone
        precision = backbone.formats.precision_of(packed=False)
        return [
            f"backbone {precision}: {product_backend(precision, self.device)}",
            f"KV cache: {backbone.kv_cache}",
            f"attention: {attention_backend('bf16', self.device)}",
            compile_fact(self.config.compile, self.device),
        ]

    def next_steps(self, folder: Path) -> list[str]:
        lora = folder / LORA
        if not self.config.merge:
            words = ["longvideo", "merge", str(self.config.model), str(lora), str(folder / MODEL)]
            words += ["--steps", str(self.config.rollout.steps)]
            if self.config.rollout.cache_fill != "clean":
                words.append("--no-clean-pass")
            return [f"adapter: {lora}", f"next: {shlex.join(words)}"]
        assert self.folder is not None
        if {"vae", "text_encoder"} <= set(self.folder.parts):
            return [f"adapter: {lora}", *describe_model(folder)]
        return [f"adapter: {lora}", f"model: {folder / MODEL} (transformer only)"]

    def adapter(self) -> Adapter:
        """Return the student's adapter, in host memory."""
        weights = {name: weight.detach().cpu() for name, weight in self.roles.trained(Role.STUDENT).items()}
        return Adapter(weights, self.config.lora.rank, self.config.lora.alpha / self.config.lora.rank)

    def _objectives(self, teacher: ModelSettings) -> tuple[StudentObjective, CriticObjective]:
        """Return the losses of student and critic, on common rollouts. teacher: settings of the teacher's model."""
        config, shift = self.config, self.settings.shift
        rollouts = SelfForcing(
            self.roles,
            config.rollout,
            spec=self.spec,
            shape=self._latent_shape(),
            shift=shift,
            seed=config.seed,
            clean_pass=self.generation.clean_pass,
        )
        copies = NoisyCopies(
            rollouts,
            config.dmd,
            guidance=self.settings.guidance,
            shift=shift,
            seed=config.seed,
            context=context_level(UniPC(teacher.steps, teacher.shift), clean_pass=teacher.clean_pass),
        )
        return StudentObjective(rollouts, copies), CriticObjective(rollouts, copies)

    def _scripts(self, scripts: Sequence[tuple[str, ...]] | None) -> Scripts:
        config = self.config
        if self.folder is None:
            return NoiseScripts(self.shape.text_len, self.shape.text_dim, dtype=self.dtype, device=self.device)
        if config.data is not None:
            clips = EncodedDataset.open(config.data)
            self._check_clips(clips, config.data)
            longest = max(stage.frames for stage in config.stages)
            if clips.num_chunks * clips.chunk_frames < longest:
                raise ConfigError(
                    f"clips of {config.data} have {clips.num_chunks * clips.chunk_frames} latent frames; expected at"
                    f" least {longest}, the frames of a stage"
                )
            return ClipScripts(clips, image_fraction=config.image_fraction, seed=config.seed, device=self.device)
        encoder = self.folder.load_text_encoder(device=self.device, dtype=self.dtype)
        if scripts is None:
            return ShapeWorldScripts(config.shapeworld, encoder.requires_grad_(False), seed=config.seed)
        texts = [text for shots in scripts for text in shots]
        prefix = self.settings.cut_prefix
        texts += [chunk_text(text, cut=True, cut_prefix=prefix) for shots in scripts for text in shots[1:]]
        features = encode_all(encoder, [*texts, config.negative_prompt])
        return FileScripts(scripts, features, seed=config.seed, text_len=self.settings.text_len, device=self.device)

    def _check_memory(self, mesh: Mesh) -> None:
        """Print the memory of a step before a weight is read; raise ConfigError if it cannot fit."""
        config = self.config
        backbones = 1 if config.teacher is None else 2
        estimates = [self._estimate(stage, mesh, backbones) for stage in config.stages]
        report_estimate(
            max(estimates, key=lambda estimate: estimate.total),
            self.device,
            mesh,
            "use backbone.precision=nvfp4, backbone.kv_cache=nvfp4, parallel.micro_batch=1 or dmd.checkpoint=true",
        )

    def _estimate(self, stage: DistillStage, mesh: Mesh, backbones: int) -> MemoryEstimate:
        config, chunks = self.config, stage.frames // self.spec.chunk_frames
        clips, passes = divide_batch(stage.batch, mesh, config.parallel.micro_batch)
        count = adapter_parameters(self.shape, config.lora)
        student, critic = (
            engine_memory(
                count, config.parallel, ranks=mesh.world, bf16=False, passes=passes * chunks, averaged=averaged
            )
            for averaged in (config.trainer.ema_decay > 0, False)
        )
        return estimate_memory(
            self.shape,
            self.spec,
            student + critic,
            BlockMemory(self.dtype.itemsize, checkpoint=config.dmd.checkpoint, compiled=config.compile),
            backbones=backbones,
            packed=config.backbone.precision != "bf16",
            kv_cache=config.backbone.kv_cache,
            clips=clips,
            chunks=chunks,
        )

    def _check_clips(self, clips: EncodedDataset, name: str) -> None:
        """Raise ConfigError unless encoded clips have the model's sizes."""
        model = self.shape
        channels, chunk_frames, *latent_size = self._latent_shape()
        for what, value, expected in (
            ("latent channels", clips.channels, channels),
            ("latent frames of a chunk", clips.chunk_frames, chunk_frames),
            ("latent height and width", clips.latent_size, tuple(latent_size)),
            ("text positions", clips.text_len, self.settings.text_len),
            ("text width", clips.text_dim, model.text_dim),
        ):
            if value != expected:
                raise ConfigError(f"{what} of {name} are {value}; expected {expected}; encode it again with this model")
        clips.check_texts(self.settings.cut_prefix)

    def _backbone(self, folder: ModelFolder | None) -> CausalTransformer:
        return load_backbone(
            folder,
            self.shape,
            formats=self.config.backbone.formats,
            dtype=self.dtype,
            device=self.device,
            seed=self.config.seed,
        )

    def _new_cache(self, model: CausalTransformer, batch: int) -> ChunkCache:
        return self.cache_type(model.cache_sizes(self.spec, batch=batch))

    def _latent_shape(self) -> tuple[int, int, int, int]:
        """Return the shape [C, T, H, W] of a chunk's latents."""
        (_, p, q), spec = self.shape.patch_size, self.spec
        return self.shape.in_channels, spec.chunk_frames, spec.grid_height * p, spec.grid_width * q

    def _shown(self) -> tuple[list[VideoRequest], list[str], list[Scene]]:
        """Return what to generate, a caption for each video, and, for ShapeWorld, the scenes to judge by."""
        config = self.config.samples
        numbers = range(config.prompts)
        if not isinstance(self.scripts, ShapeWorldScripts):
            scripts = [self.scripts.draw(0, number, config.chunks) for number in numbers]
            clips = [self.source.assemble([script], 0, [number]) for number, script in enumerate(scripts)]
            return clips, [" / ".join(dict.fromkeys(script.prompts)) for script in scripts], []
        scenes = sample_scenes(config.prompts, seed=self.config.seed, split="heldout", pair_fraction=0.5)
        prompts = [caption(scene, index) for index, scene in enumerate(scenes)]
        cuts = (True, *([False] * (config.chunks - 1)))
        scripts = [ChunkScript((prompt,) * config.chunks, cuts) for prompt in prompts]
        return [self.source.assemble(scripts, 0, numbers)], prompts, scenes

    def generate(self, clip: VideoRequest, autoencoder: Autoencoder, steps: int) -> Samples:
        """Return samples of every video, as the finished student generates it in `steps` steps."""
        latents = sample_latents(
            self.roles.switch(Role.STUDENT),
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
    def generation(self) -> ModelSettings:
        """Settings that the finished student generates with."""
        return self.config.rollout.distilled(self.settings)

    @property
    def cache_type(self) -> type[ChunkCache]:
        return CACHES[self.config.backbone.kv_cache]
