"""Train the causal transformer on a folder of encoded clips, in one process or in many."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.modules import OnMeta
from longvideo.checkpoint.settings import VAE_SCALE, ModelSettings, check_settings, chunk_spec
from longvideo.config.fields import Bounded, bounded, seed_field
from longvideo.distributed import Mesh, ParallelConfig, check_sequence, divide_batch
from longvideo.errors import ConfigError
from longvideo.flow.schedule import FlowSchedule
from longvideo.flow.unipc import UniPC
from longvideo.machine.launcher import launched
from longvideo.model.cache import visible_chunks
from longvideo.model.conditioning import batch_texts
from longvideo.model.config import PRESETS, TransformerConfig
from longvideo.model.transformer import CausalTransformer
from longvideo.rollout import context_level
from longvideo.train.batch import ViewStage
from longvideo.train.clips.views import ClipInfo, Clips, ClipViewConfig, ClipViewSource, RandomClips
from longvideo.train.cost import clip_flops, copied_rows, estimate_memory
from longvideo.train.error_recycling import ErrorBank
from longvideo.train.products import NVFP4_KEYS, ProductsConfig, prepare
from longvideo.train.recycling_config import ErrorRecyclingConfig
from longvideo.train.teacher_forcing import TeacherForcing, TeacherForcingConfig, runnable
from longvideo.training.memory import (
    FP32,
    ROWS_MASKED,
    BlockMemory,
    MemoryEstimate,
    engine_memory,
    report_estimate,
)
from longvideo.training.objective import check_stages, stage_at
from longvideo.training.optimizer import OptimizerConfig, RateSegment
from longvideo.training.recipe import Recipe
from longvideo.training.run_folder import MODEL, describe_model
from longvideo.training.sampling import SampleDecoder, Samples, decode_samples, sample_latents
from longvideo.training.trainer import TrainerConfig
from longvideo.training.validation import validation_loss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longvideo.train.step_rounding import Phases
    from longvideo.training.checkpoint import Checkpoint
    from longvideo.vae.autoencoder import Autoencoder


@dataclass(frozen=True)
class ClipValidationConfig(Bounded):
    """What is measured and drawn for every sample.

    data: folder of encoded clips to compute the loss on, always with the same noise.
    batch: number of clips in a batch.
    batches: number of batches; 0 computes no loss.
    prompts: number of clips whose captions are made into videos, from the validation data if there is some.
    chunks: number of chunks of such a video.
    """

    data: str | None = None
    batch: int = bounded(8, least=1)
    batches: int = bounded(2, least=0)
    prompts: int = bounded(2, least=0)
    chunks: int = bounded(4, least=1)


@dataclass(frozen=True)
class ClipTraining(Bounded):
    """Configuration of `longvideo train clips`.

    seed: seed of weights, data and noise.
    data: folder that `longvideo data encode` made, or a manifest of videos, which are encoded again in every epoch.
        `--dry-run` needs neither: it uses noise of the shapes of `settings`.
    initialize: model folder to take everything else from, its settings too. Without one, a transformer of `preset`
        starts from random weights.
    preset: shape of a transformer that starts from random weights.
    settings: chunks, picture size and generation defaults of a model that starts from random weights; a value other
        than that of the model in `initialize` is refused.
    views: what is taken from a clip, and how much noise it gets.
    objective: how the loss is computed.
    products: number format of the products of the blocks.
    recycle_errors: whether to add the model's own earlier errors to its inputs.
    recycling: how errors are kept and added.
    stages: runs of steps, one after another.
    optimizer: optimizer and its schedule.
    trainer: logs, samples and checkpoints.
    parallel: division over several processes.
    validation: loss on held-out clips, and videos that are generated for every sample.
    """

    renamed: ClassVar = NVFP4_KEYS

    seed: int = seed_field()
    data: str | None = None
    initialize: str | None = None
    preset: str = "wan2.2-ti2v-5b"
    settings: ModelSettings = field(default_factory=ModelSettings)
    views: ClipViewConfig = field(default_factory=ClipViewConfig)
    objective: TeacherForcingConfig = field(default_factory=lambda: TeacherForcingConfig(checkpoint=True))
    products: ProductsConfig = field(default_factory=ProductsConfig)
    recycle_errors: bool = False
    recycling: ErrorRecyclingConfig = field(default_factory=ErrorRecyclingConfig)
    stages: list[ViewStage] = field(default_factory=lambda: [ViewStage(steps=600, batch=1, chunks=12)])
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-5, schedule="constant", beta2=0.999, gradient_clip=10)
    )
    trainer: TrainerConfig = field(
        default_factory=lambda: TrainerConfig(ema_decay=0.99, log_every=1, save_every=100, max_skipped_steps=10)
    )
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    validation: ClipValidationConfig = field(default_factory=ClipValidationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stages(self.stages)
        self.phases()  # refuses an end of the products that does not exist
        if self.preset not in PRESETS:
            raise ConfigError(f"preset is {self.preset!r}; expected one of {', '.join(PRESETS)}")

    def phases(self) -> Phases:
        """Return the phase of the products in every step."""
        return self.products.phases(self.optimizer, sum(stage.steps for stage in self.stages))


class ClipRecipe(Recipe[TeacherForcing, ClipViewSource]):
    """Trains on encoded clips, or on the videos of a manifest: `longvideo train clips`."""

    def __init__(self, config: ClipTraining, device: torch.device, mesh: Mesh, *, dry_run: bool) -> None:
        self.config = config
        self.segments = [RateSegment(stage.steps, stage.learning_rate) for stage in config.stages]
        self.folder = None if config.initialize is None else ModelFolder.open(config.initialize)
        self.settings = config.settings
        if self.folder is not None:
            self.settings = self.folder.settings
            check_settings(config.settings, self.settings, str(config.initialize))
        shape = PRESETS[config.preset] if self.folder is None else self.folder.transformer_config
        check_sequence(
            mesh.sequence, heads=shape.num_attention_heads, chunk_counts=[stage.chunks for stage in config.stages]
        )
        self.spec = chunk_spec(self.settings)
        self.objective_config = runnable(config.objective, config.parallel)
        self._check_memory(shape, device, mesh)
        self.mesh = mesh
        self.device = device
        self.clips = self._open_clips(config.data, dry_run=dry_run)
        held_out = config.validation.data
        self.held_out = None if held_out is None else self._open_clips(held_out, dry_run=dry_run)
        if self.folder is not None:
            self.transformer = self.folder.load_transformer(device=device, dtype=torch.float32).train()
        else:
            with torch.device(device):
                self.transformer = CausalTransformer(shape)
            self.transformer.initialize(torch.Generator(device).manual_seed(config.seed))
        schedule = FlowSchedule(self.settings.shift)
        self.bank = None
        if config.recycle_errors:
            size = (self.settings.height // VAE_SCALE, self.settings.width // VAE_SCALE)
            chunk = (shape.in_channels, self.settings.chunk_frames, *size)
            self.bank = ErrorBank(config.recycling, schedule, chunk_shape=chunk, seed=config.seed, device=device)
        self.objective = TeacherForcing(
            self.transformer,
            None,
            self.objective_config,
            spec=self.spec,
            schedule=schedule,
            device=device,
            mesh=mesh,
            bank=self.bank,
            rounding=prepare(
                config.products,
                self.transformer,
                config.phases(),
                spec=self.spec,
                seed=config.seed,
                mesh=mesh,
            ),
            context=context_level(UniPC(self.settings.steps, self.settings.shift), clean_pass=self.settings.clean_pass),
        )
        self.decoder = None
        if self.folder is not None and "vae" in self.folder.parts:
            self.decoder = SampleDecoder(self.folder, device=device, dtype=torch.float32)
        self.source = self._source(self.clips, config.stages, config.views, config.seed)
        self.source.check(mesh, config.parallel.micro_batch)
        self.validation = None
        if self.held_out is not None:
            batch, chunks = config.validation.batch, max(stage.chunks for stage in config.stages)
            plain = ClipViewConfig(prompt_dropout=0.0)
            self.validation = self._source(self.held_out, [ViewStage(batch=batch, chunks=chunks)], plain, 0)
            self.validation.check(mesh, config.parallel.micro_batch)

    def flops(self, step: int) -> float:
        stage = stage_at(self.config.stages, step)
        visible = None
        if self.config.objective.context == "window":
            visible = visible_chunks(self.spec, [False] * stage.chunks)
        return stage.batch * clip_flops(self.transformer.config, self.spec, stage.chunks, visible)

    def state(self) -> dict[str, Tensor]:
        """Return the recycled errors of this rank, and the state of its products."""
        rounding = self.objective.rounding
        errors = {} if self.bank is None else self.bank.state()
        return errors | ({} if rounding is None else rounding.state())

    def load(self, checkpoint: Checkpoint, mesh: Mesh) -> list[str]:
        rounding, written = self.objective.rounding, checkpoint.state
        notes = [] if rounding is None else rounding.load(written, checkpoint.recipes())
        if self.bank is not None:
            self.bank.load(checkpoint.recipes(), rank=mesh.rank, world=mesh.world)
            if changed := written.changed_ranks(mesh.world, mesh.sequence):
                notes.append(f"{changed}: recycled errors are divided again, so losses are comparable, not equal")
        return notes

    def validate(self) -> dict[str, float]:
        """Return the loss on held-out clips, each with noise of its own that never changes."""
        if self.validation is None or not self.config.validation.batches:
            return {}
        return {
            "val_loss": validation_loss(
                self.objective,
                self.validation,
                batches=self.config.validation.batches,
                mesh=self.mesh,
                micro_batch=self.config.parallel.micro_batch,
                precision=self.config.trainer.precision,
            )
        }

    def sample(self, step: int, folder: Path) -> dict[str, float]:
        """Generate videos from the captions of some clips and draw a strip of each."""
        config = self.config.validation
        if self.decoder is None or not config.prompts:
            return {}
        from longvideo.evaluation.samples import record_samples

        clips = self.held_out or self.clips
        shown = clips.clips[: config.prompts]
        with self.decoder.on_device() as autoencoder:
            samples = Samples.join(
                [self.roll_out(clips, clip, autoencoder, seed=seed) for seed, clip in enumerate(shown)]
            )
        captions = [" / ".join(dict.fromkeys(clip.captions[: config.chunks])) for clip in shown]
        file = folder / f"ar_{step:07d}.png"
        return record_samples(
            samples.frames,
            samples.latents,
            captions,
            file,
            shown=len(shown),
            fps=self.settings.fps,
            decoder=self.decoder.folder,
        )

    def roll_out(self, clips: Clips, clip: ClipInfo, autoencoder: Autoencoder, *, seed: int) -> Samples:
        """Return one sample. After the last chunk of a clip its last caption is used."""
        chunks, last = self.config.validation.chunks, len(clip.captions) - 1
        prompts = [clip.captions[min(chunk, last)] for chunk in range(chunks)]
        cuts = [chunk <= last and bool(clip.cuts[chunk]) for chunk in range(chunks)]
        texts = batch_texts([prompts], cuts, cut_prefix=self.settings.cut_prefix)
        latents = sample_latents(
            self.transformer,
            self.settings,
            self.spec,
            features_PJD=torch.stack([clips.text(text) for text in texts.texts]).to(self.device),
            rows_NB=texts.rows_NB.to(self.device),
            cuts=cuts,
            seeds=[seed],
        )
        return decode_samples(autoencoder, latents)

    def _source(self, clips: Clips, stages: Sequence[ViewStage], views: ClipViewConfig, seed: int) -> ClipViewSource:
        pins_matter = self.config.objective.context == "window" and self.spec.pin_shots
        return ClipViewSource(
            clips,
            stages,
            views,
            self.objective.schedule,
            seed=seed,
            tokens_per_chunk=self.spec.tokens_per_chunk,
            cuts_matter=bool(self.spec.offset_per_shot) or pins_matter,
            cut_prefix=self.settings.cut_prefix,
            device=self.device,
        )

    def export(self, folder: Path) -> None:
        """Write a model folder; its autoencoder and text encoder are copied from the initial model."""
        ModelFolder.save(
            folder,
            settings=replace(self.settings, text_len=self.transformer.config.text_len),
            transformer=self.transformer,
            other_parts=self.folder,
            dtype=torch.bfloat16,
            overwrite=True,
        )

    def facts(self) -> list[str]:
        return self.objective.facts()

    def next_steps(self, folder: Path) -> list[str]:
        if self.folder is not None and {"vae", "text_encoder"} <= set(self.folder.parts):
            return describe_model(folder)
        model = folder / MODEL
        return [f"model: {model} (transformer only)", f"next: longvideo info {shlex.quote(str(model))}"]

    def _open_clips(self, path: str | None, *, dry_run: bool) -> Clips:
        config, settings = self.config, self.settings
        shape = PRESETS[config.preset] if self.folder is None else self.folder.transformer_config
        size = (settings.height // VAE_SCALE, settings.width // VAE_SCALE)
        if path is None:
            if not dry_run:
                raise ConfigError(
                    "data is not set; expected a folder of `longvideo data encode`, or a manifest of videos"
                )
            return RandomClips(
                chunks=max(stage.chunks for stage in config.stages),
                chunk_frames=settings.chunk_frames,
                latents=(shape.in_channels, *size),
                text=(shape.text_len, shape.text_dim),
            )
        if Path(path).is_file():
            if self.folder is None:
                raise ConfigError(
                    f"initialize is not set; expected a model folder, to encode the videos of {path} with"
                )
            from longvideo.train.clips.video_clips import VideoClips

            chunks = max(stage.chunks for stage in config.stages)
            precision = config.trainer.precision
            return VideoClips(Path(path), self.folder, chunks=chunks, device=self.device, precision=precision)
        from longvideo.data.encoded import EncodedDataset

        clips = EncodedDataset.open(path)
        sizes = {
            "latent channels": (clips.channels, shape.in_channels),
            "latent size": (clips.latent_size, size),
            "chunk_frames": (clips.chunk_frames, settings.chunk_frames),
            "text_len": (clips.text_len, shape.text_len),
            "text_dim": (clips.text_dim, shape.text_dim),
        }
        for name, (got, expected) in sizes.items():
            if got != expected:
                raise ConfigError(
                    f"{name} of {path} is {got}; expected {expected}, as the model; encode with this model"
                )
        clips.check_texts(settings.cut_prefix)
        return clips

    def _check_memory(self, shape: TransformerConfig, device: torch.device, mesh: Mesh) -> None:
        """Print the memory of a step before anything is loaded; raise ConfigError if it cannot fit."""
        config = self.config
        with OnMeta():
            num_parameters = sum(p.numel() for p in CausalTransformer(shape).parameters())
        estimate = max(
            (self._estimate(stage, shape, num_parameters, device, mesh) for stage in config.stages),
            key=lambda estimate: estimate.total,
        )
        report_estimate(
            estimate,
            device,
            mesh,
            "use more ranks, a higher parallel.sequence or parallel.zero_stage, fewer chunks, or"
            " objective.checkpoint=true",
        )

    def _estimate(
        self, stage: ViewStage, shape: TransformerConfig, num_parameters: int, device: torch.device, mesh: Mesh
    ) -> MemoryEstimate:
        config = self.config
        clips, passes = divide_batch(stage.batch, mesh, config.parallel.micro_batch)
        bf16 = config.trainer.precision != "fp32" and device.type == "cuda"
        engine = engine_memory(
            num_parameters,
            config.parallel,
            ranks=mesh.world,
            bf16=bf16,
            passes=passes,
            averaged=config.trainer.ema_decay > 0,
        )
        blockwise = config.objective.attention == "blockwise"
        blocks = BlockMemory(
            size=2 if bf16 else FP32,
            checkpoint=self.objective_config.checkpoint,
            compiled=self.objective_config.compile,
            nvfp4=config.products.format == "nvfp4",
            copies=copied_rows(stage.chunks, mesh.sequence) if blockwise else ROWS_MASKED / 2,
        )
        return estimate_memory(
            shape,
            self.spec,
            engine,
            blocks,
            chunks=stage.chunks,
            clips=clips,
            sequence=mesh.sequence,
            autocast=bf16 and not launched(),
        )
