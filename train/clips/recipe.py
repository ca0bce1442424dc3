"""Train the causal transformer on a folder of encoded clips, in one process or in many."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.settings import VAE_SCALE, check_settings, chunk_spec
from longvideo.distributed import Mesh, check_sequence
from longvideo.errors import ConfigError
from longvideo.flow.schedule import FlowSchedule
from longvideo.flow.unipc import UniPC
from longvideo.model.conditioning import batch_texts
from longvideo.model.config import PRESETS
from longvideo.model.transformer import CausalTransformer
from longvideo.rollout import context_level
from longvideo.train.batch import ViewStage
from longvideo.train.clips.coreset import SELECTION, Coreset, velocity_norms
from longvideo.train.clips.memory import check_memory
from longvideo.train.clips.views import ClipInfo, Clips, ClipViewConfig, ClipViewSource, RandomClips
from longvideo.train.cost import clip_flops, seen_chunks
from longvideo.train.error_recycling import ErrorBank
from longvideo.train.products import prepare
from longvideo.train.teacher_forcing import TeacherForcing, runnable
from longvideo.training.objective import stage_at
from longvideo.training.optimizer import RateSegment
from longvideo.training.recipe import Recipe
from longvideo.training.run_folder import MODEL, describe_model
from longvideo.training.sampling import SampleDecoder, Samples, decode_samples, sample_latents
from longvideo.training.validation import validation_losses

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longvideo.train.clips.config import ClipTraining
    from longvideo.training.checkpoint import Checkpoint
    from longvideo.vae.autoencoder import Autoencoder


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
        check_memory(config, shape, self.spec, device, mesh)
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
                warmup_steps=config.optimizer.warmup_steps,
            ),
            context=context_level(UniPC(self.settings.steps, self.settings.shift), clean_pass=self.settings.clean_pass),
        )
        self.decoder = None
        if self.folder is not None and "vae" in self.folder.parts:
            self.decoder = SampleDecoder(self.folder, device=device, dtype=torch.float32)
        self.coreset = self._new_coreset()
        self.source = self._source(self.clips, config.stages, config.views, config.seed, self.coreset)
        self.source.check(mesh, config.parallel.micro_batch)
        self.validation = None
        if self.held_out is not None:
            batch, chunks = config.validation.batch, max(stage.chunks for stage in config.stages)
            plain = ClipViewConfig(prompt_dropout=0.0)
            self.validation = self._source(self.held_out, [ViewStage(batch=batch, chunks=chunks)], plain, 0)
            self.validation.check(mesh, config.parallel.micro_batch)

    def flops(self, step: int) -> float:
        stage = stage_at(self.config.stages, step)
        visible = seen_chunks(self.spec, stage.chunks, self.config.objective.context)
        return stage.batch * clip_flops(self.transformer.config, self.spec, stage.chunks, visible)

    def state(self) -> dict[str, Tensor]:
        """Return the recycled errors of this rank, the state of its products, and the selected clips."""
        rounding = self.objective.rounding
        errors = {} if self.bank is None else self.bank.state()
        selected = {} if self.coreset is None else self.coreset.state()
        return errors | selected | ({} if rounding is None else rounding.state())

    def load(self, checkpoint: Checkpoint, mesh: Mesh) -> list[str]:
        rounding, written = self.objective.rounding, checkpoint.state
        notes = [] if rounding is None else rounding.load(written, checkpoint.recipes())
        if self.bank is not None:
            self.bank.load(checkpoint.recipes(), rank=mesh.rank, world=mesh.world)
            if changed := written.changed_ranks(mesh.world, mesh.sequence):
                notes.append(f"{changed}: recycled errors are divided again, so losses are comparable, not equal")
        stored = checkpoint.recipes()
        if self.coreset is not None and stored and SELECTION in stored[0].infos:
            notes += [note for note in [self.coreset.load(stored[0].read(SELECTION))] if note is not None]
        return notes

    def validate(self) -> dict[str, float]:
        """Return losses on held-out clips, each with noise of its own that never changes."""
        if self.validation is None or not self.config.validation.batches:
            return {}
        return validation_losses(
            self.objective,
            self.validation,
            batches=self.config.validation.batches,
            mesh=self.mesh,
            micro_batch=self.config.parallel.micro_batch,
            precision=self.config.trainer.precision,
        )

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

    def _source(
        self,
        clips: Clips,
        stages: Sequence[ViewStage],
        views: ClipViewConfig,
        seed: int,
        coreset: Coreset | None = None,
    ) -> ClipViewSource:
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
            coreset=coreset,
        )

    def _new_coreset(self) -> Coreset | None:
        """Return the selection of clips, or None if all of them are used."""
        config, num_clips = self.config, len(self.clips.clips)
        if config.coreset.share == 1:
            return None
        stage = ViewStage(batch=self.mesh.replicas, chunks=max(stage.chunks for stage in config.stages))
        every_clip = self._source(self.clips, [stage], ClipViewConfig(prompt_dropout=0.0), config.seed)
        return Coreset(
            config.coreset,
            num_clips=num_clips,
            num_views=sum(stage.steps * stage.batch for stage in config.stages),
            seed=config.seed,
            norms=lambda: velocity_norms(
                self.objective,
                every_clip,
                num_clips=num_clips,
                mesh=self.mesh,
                precision=config.trainer.precision,
                device=self.device,
            ),
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
