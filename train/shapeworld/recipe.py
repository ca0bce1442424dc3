"""Train the causal transformer and its text encoder on ShapeWorld: build, generate samples, export."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.settings import ModelSettings, chunk_spec
from longvideo.config.fields import Bounded, bounded, seed_field
from longvideo.distributed import Mesh, ParallelConfig, check_sequence
from longvideo.errors import ConfigError
from longvideo.flow.schedule import FlowSchedule
from longvideo.flow.unipc import UniPC
from longvideo.model.conditioning import batch_texts
from longvideo.model.config import PRESETS, TransformerConfig
from longvideo.model.transformer import CausalTransformer
from longvideo.rollout import context_level
from longvideo.shapeworld.captions import caption, vocabulary
from longvideo.shapeworld.world import WORLD_NAME, Split, recolor, sample_scenes
from longvideo.text.encoder import TextEncoder
from longvideo.train.batch import ViewStage
from longvideo.train.products import NVFP4_KEYS, ProductsConfig, prepare
from longvideo.train.shapeworld.captions import tokenize_captions
from longvideo.train.shapeworld.latent_bank import BankConfig, LatentBank
from longvideo.train.shapeworld.scenes import FPS, SceneConfig, ScenePool
from longvideo.train.shapeworld.views import ViewConfig, ViewSource
from longvideo.train.teacher_forcing import TeacherForcing, TeacherForcingConfig, runnable
from longvideo.training.objective import check_stages
from longvideo.training.optimizer import OptimizerConfig, RateSegment
from longvideo.training.recipe import Recipe
from longvideo.training.run_folder import describe_model
from longvideo.training.sampling import Samples, decode_samples, sample_latents
from longvideo.training.trainer import TrainerConfig
from longvideo.training.validation import validation_losses

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from longvideo.train.step_rounding import Phases
    from longvideo.training.checkpoint import Checkpoint


@dataclass(frozen=True)
class TransformerShape(Bounded):
    """Sizes that replace those of a preset. Channels and text width come from the autoencoder and the text encoder.

    preset: `tiny` or `wan2.2-ti2v-5b`.
    num_attention_heads: number of attention heads.
    attention_head_dim: width of an attention head.
    ffn_dim: width inside the feed-forward layers.
    num_layers: number of transformer blocks.
    text_len: number of text positions.
    """

    preset: str = "tiny"
    num_attention_heads: int | None = bounded(None, least=1)
    attention_head_dim: int | None = bounded(None, least=1)
    ffn_dim: int | None = bounded(None, least=1)
    num_layers: int | None = bounded(None, least=1)
    text_len: int | None = bounded(None, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in PRESETS:
            raise ConfigError(f"model.preset is {self.preset!r}; expected one of {', '.join(PRESETS)}")

    def build(self, *, channels: int, text_dim: int) -> TransformerConfig:
        return replace(
            PRESETS[self.preset], in_channels=channels, out_channels=channels, text_dim=text_dim, **self._sizes()
        )

    def check(self, stored: TransformerConfig, folder: str) -> None:
        """Raise ConfigError if a size that is set here is not that of the model a run starts from."""
        for name, value in self._sizes().items():
            if getattr(stored, name) != value:
                raise ConfigError(
                    f"model.{name} is {value}; expected {getattr(stored, name)}, as the model in {folder}; leave it out"
                )

    def _sizes(self) -> dict[str, int]:
        return {name: value for name, value in vars(self).items() if value is not None and name != "preset"}


@dataclass(frozen=True)
class HeldOutRolloutConfig(Bounded):
    """Videos of held-out prompts that are generated for every sample.

    prompts: number of prompts; 0 generates nothing.
    shown: number of videos that are drawn; 0 draws none.
    chunks: number of chunks of a video.
    judge: whether the judge scores the videos: the share that matches the prompt.
    """

    prompts: int = bounded(24, least=0)
    shown: int = bounded(6, least=0)
    chunks: int = bounded(4, least=1)
    judge: bool = True


@dataclass(frozen=True)
class HeldOutConfig(Bounded):
    """Loss on held-out scenes, always the same views with the same noise.

    batches: number of batches; 0 computes no loss.
    batch: number of views in a batch.
    clips: number of encoded clips that views are taken from.
    """

    batches: int = bounded(0, least=0)
    batch: int = bounded(64, least=1)
    clips: int = bounded(512, least=1)


@dataclass(frozen=True)
class ArTraining(Bounded):
    """Configuration of `longvideo train ar`.

    seed: seed of weights, data and noise.
    vae: model folder with the autoencoder.
    initialize: model folder to take the transformer and the text encoder from; by default both start from random
        weights.
    shipped: packaged models by keys such as `vae`, used where the folder named there does not exist.
    export_dtype: number format of the exported weights.
    model: sizes of the transformer.
    settings: chunks, picture size and generation defaults that the exported model has.
    scenes: scenes that clips are rendered from.
    bank: encoded clips, kept on the device.
    views: what is taken from a clip, and how much noise it gets.
    objective: how the loss is computed.
    products: number format of the products of the blocks.
    stages: runs of steps, one after another.
    optimizer: optimizer and its schedule.
    trainer: logs, samples and checkpoints.
    parallel: division over several processes.
    rollout: videos that are generated for every sample.
    validation: loss on held-out scenes.
    """

    renamed: ClassVar = NVFP4_KEYS

    seed: int = seed_field()
    vae: str = "runs/vae/model"
    initialize: str | None = None
    shipped: dict[str, str] = field(default_factory=lambda: {"vae": "tiny"})
    export_dtype: Literal["bf16", "fp32"] = "bf16"
    model: TransformerShape = field(default_factory=TransformerShape)
    settings: ModelSettings = field(default_factory=ModelSettings)
    scenes: SceneConfig = field(default_factory=SceneConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    objective: TeacherForcingConfig = field(default_factory=TeacherForcingConfig)
    products: ProductsConfig = field(default_factory=ProductsConfig)
    stages: list[ViewStage] = field(default_factory=lambda: [ViewStage()])
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    rollout: HeldOutRolloutConfig = field(default_factory=HeldOutRolloutConfig)
    validation: HeldOutConfig = field(default_factory=HeldOutConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stages(self.stages)
        self.phases()  # refuses an end of the products that does not exist
        if (self.settings.height, self.settings.width) != (self.scenes.height, self.scenes.width):
            raise ConfigError(
                f"settings.height and width are {self.settings.height}x{self.settings.width}; expected"
                f" {self.scenes.height}x{self.scenes.width}, those of the scenes"
            )
        if self.validation.batches and self.validation.clips % self.bank.group:
            raise ConfigError(
                f"validation.clips is {self.validation.clips}; expected a multiple of bank.group={self.bank.group}"
            )
        pins = self.settings.pin_shots and self.objective.context == "window"
        if self.bank.cut_fraction and (self.settings.offset_per_shot or pins):
            raise ConfigError(
                f"bank.cut_fraction is {self.bank.cut_fraction}, but views of ShapeWorld share positions and context:"
                " clips with cuts need settings.offset_per_shot=0, and with objective.context=window also"
                " settings.pin_shots=false; change these or set bank.cut_fraction=0"
            )

    def phases(self) -> Phases:
        """Return the phase of the products in every step."""
        return self.products.phases(self.optimizer, sum(stage.steps for stage in self.stages))


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class ArRecipe(Recipe[TeacherForcing, ViewSource]):
    """Trains the transformer and its text encoder on ShapeWorld: `longvideo train ar`."""

    def __init__(self, config: ArTraining, device: torch.device, mesh: Mesh, *, dry_run: bool = False) -> None:
        if dry_run:
            config = replace(config, bank=config.bank.of_dry_run())
        self.config = config
        self.device = device
        self.mesh = mesh
        self.segments = [RateSegment(stage.steps, stage.learning_rate) for stage in config.stages]
        self.vae_folder = ModelFolder.open(config.vae)
        self.autoencoder = self.vae_folder.load_vae(device=device, dtype=torch.float32)
        self.autoencoder.requires_grad_(False)
        self.transformer, self.text_encoder = self._build_model()
        check_sequence(
            mesh.sequence,
            heads=self.transformer.config.num_attention_heads,
            chunk_counts=[stage.chunks for stage in config.stages],
        )
        self.spec = chunk_spec(config.settings, self.autoencoder.config.scale_factor_spatial)
        self.objective = TeacherForcing(
            self.transformer,
            self.text_encoder,
            runnable(config.objective, config.parallel),
            spec=self.spec,
            schedule=FlowSchedule(config.settings.shift),
            device=device,
            mesh=mesh,
            rounding=prepare(
                config.products,
                self.transformer,
                config.phases(),
                spec=self.spec,
                seed=config.seed,
                mesh=mesh,
                warmup_steps=config.optimizer.warmup_steps,
            ),
            context=context_level(
                UniPC(config.settings.steps, config.settings.shift), clean_pass=config.settings.clean_pass
            ),
        )
        self.source = self._views(
            "train", config.bank, config.stages, config.views, seed=config.seed, count=config.scenes.count
        )
        self.validation = None
        if config.validation.batches:
            held_out = config.validation
            bank = replace(
                config.bank, clips=held_out.clips, initial_clips=held_out.clips, refresh_every=held_out.batches
            )
            stages = [ViewStage(batch=held_out.batch, chunks=config.stages[-1].chunks)]
            views = replace(config.views, prompt_dropout=0.0)
            self.validation = self._views("heldout", bank, stages, views, seed=0, count=held_out.clips)
            self.validation.passes(mesh, config.parallel.micro_batch)

    def _views(
        self,
        split: Split,
        bank: BankConfig,
        stages: Sequence[ViewStage],
        views: ViewConfig,
        *,
        seed: int,
        count: int,
    ) -> ViewSource:
        config, scenes = self.config, self.config.scenes
        drawn = sample_scenes(count, seed=config.seed, split=split, pair_fraction=scenes.pair_fraction)
        pool = ScenePool(
            drawn,
            height=scenes.height,
            width=scenes.width,
            device=self.device,
            recolored=[recolor(scene) for scene in drawn] if bank.recolor_fraction or views.wrong_color else [],
        )
        tokens = tokenize_captions(
            pool.scenes,
            self.text_encoder,
            phrasings=views.phrasings,
            omit=views.caption_omit,
            device=self.device,
            distinct=pool.count,
            cut_prefix=config.settings.cut_prefix,
        )
        latents = LatentBank(
            self.autoencoder,
            pool,
            bank,
            chunk_frames=self.spec.chunk_frames,
            seed=seed,
            precision=config.trainer.precision,
        )
        return ViewSource(
            latents,
            tokens,
            stages,
            views,
            self.objective.schedule,
            seed=seed,
            tokens_per_chunk=self.spec.tokens_per_chunk,
        )

    def start(self, step: int) -> None:
        """Encode the clips of the bank."""
        self.source.start(step)

    def validate(self) -> dict[str, float]:
        if self.validation is None:
            return {}
        if not self.validation.bank.filled:
            self.validation.start(0)
        return validation_losses(
            self.objective,
            self.validation,
            batches=self.config.validation.batches,
            mesh=self.mesh,
            micro_batch=self.config.parallel.micro_batch,
            precision=self.config.trainer.precision,
        )

    def load(self, checkpoint: Checkpoint, mesh: Mesh) -> list[str]:
        del mesh
        rounding = self.objective.rounding
        return [] if rounding is None else rounding.load(checkpoint.state, checkpoint.recipes())

    def state(self) -> dict[str, Tensor]:
        """Return the state of the products."""
        rounding = self.objective.rounding
        return {} if rounding is None else rounding.state()

    def sample(self, step: int, folder: Path) -> dict[str, float]:
        """Generate videos of held-out prompts, draw a strip of each, and let the judge score all of them."""
        from longvideo.evaluation.samples import record_samples

        config = self.config.rollout
        if not config.prompts:
            return {}
        scenes = sample_scenes(config.prompts, seed=self.config.seed, split="heldout", pair_fraction=0.5)
        prompts = [caption(scene, index) for index, scene in enumerate(scenes)]
        samples = self.roll_out(prompts)
        return record_samples(
            samples.frames,
            samples.latents,
            prompts,
            folder / f"ar_{step:07d}.png",
            shown=config.shown,
            scenes=scenes if config.judge else (),
            fps=FPS,
            decoder=self.vae_folder,
        )

    @torch.no_grad()
    def roll_out(self, prompts: Sequence[str]) -> Samples:
        """Generate one clip for each prompt, in one batch."""
        chunks = self.config.rollout.chunks
        cuts = (False,) * chunks
        texts = batch_texts([[prompt] * chunks for prompt in prompts], cuts, cut_prefix=self.config.settings.cut_prefix)
        features, rows = self.text_encoder.encode(texts.texts)
        latents = sample_latents(
            self.transformer,
            self.config.settings,
            self.spec,
            features_PJD=features[rows],
            rows_NB=texts.rows_NB.to(self.device),
            cuts=cuts,
            seeds=range(len(prompts)),
        )
        return decode_samples(self.autoencoder, latents)

    def export(self, folder: Path) -> None:
        """Write a complete model folder."""
        ModelFolder.save(
            folder,
            settings=replace(self.config.settings, text_len=self.transformer.config.text_len, trained_on=WORLD_NAME),
            transformer=self.transformer,
            other_parts=self.vae_folder,
            text_encoder=self.text_encoder,
            dtype=DTYPES[self.config.export_dtype],
            overwrite=True,
        )

    def facts(self) -> list[str]:
        return self.objective.facts()

    def next_steps(self, folder: Path) -> list[str]:
        return describe_model(folder)

    def _build_model(self) -> tuple[CausalTransformer, TextEncoder]:
        config = self.config
        if config.initialize is not None:
            folder = ModelFolder.open(config.initialize)
            config.model.check(folder.transformer_config, config.initialize)
            channels, latent_channels = folder.transformer_config.in_channels, self.autoencoder.config.z_dim
            if channels != latent_channels:
                raise ConfigError(
                    f"the transformer in {config.initialize} has {channels} latent channels; expected"
                    f" {latent_channels}, as the autoencoder in vae={config.vae}; use the one it was trained with"
                )
            transformer = folder.load_transformer(device=self.device, dtype=torch.float32)
            return transformer, folder.load_text_encoder(device=self.device, dtype=torch.float32)
        words = [*vocabulary(), config.settings.cut_prefix]
        text_len = config.model.text_len or PRESETS[config.model.preset].text_len
        text_encoder = TextEncoder.build_tiny(words, seed=config.seed, text_len=text_len).to(self.device)
        text_dim = text_encoder.config_json()["d_model"]
        transformer = CausalTransformer(config.model.build(channels=self.autoencoder.config.z_dim, text_dim=text_dim))
        transformer.initialize(torch.Generator().manual_seed(config.seed))
        return transformer.to(self.device), text_encoder
