"""Train a small decoder for the latents of a model: build, compare with the full decoder, export."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from longvideo.checkpoint.decoders import open_decoder, save_decoder
from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.parts import TEXT_ENCODER, TRANSFORMER
from longvideo.config.fields import Bounded, bounded, seed_field
from longvideo.distributed import ParallelConfig
from longvideo.errors import ConfigError
from longvideo.machine.launcher import launched
from longvideo.pixels import to_uint8
from longvideo.shapeworld.world import WORLD_NAME, Split, sample_scenes
from longvideo.train.decoder.distillation import DecoderDistillation, DistillationConfig
from longvideo.train.decoder.generated import GeneratedFootage, MixedFootage
from longvideo.train.decoder.pairs import (
    EncodedFootage,
    LatentFootage,
    PairBank,
    PairConfig,
    WorldFootage,
    decode_clips,
)
from longvideo.train.decoder.report import Comparison, object_regions, picture_regions, table
from longvideo.train.decoder.windows import WindowConfig, WindowSource, WindowStage
from longvideo.train.shapeworld.latent_bank import BankConfig, LatentBank
from longvideo.train.shapeworld.scenes import SceneConfig, ScenePool
from longvideo.training.objective import check_stages, compile_fact
from longvideo.training.optimizer import OptimizerConfig, RateSegment
from longvideo.training.precision import autocast
from longvideo.training.recipe import Recipe
from longvideo.training.run_folder import MODEL
from longvideo.training.trainer import TrainerConfig
from longvideo.vae.tae import TinyAutoencoderConfig, TinyDecoder

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from longvideo.data.encoded import EncodedDataset

DECODER = "decoder"
"""Name of the exported file, without suffix."""
LATE_FRACTION = 0.5
"""Share of ShapeWorld's clips that begin later than their first scene."""
GENERATED_FRACTION = 0.5
"""Share of the clips that a model of ShapeWorld generates itself, by default."""
DIFFERENCE_GAIN = 8
"""Factor of the differences that are drawn."""
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class DecoderValidationConfig(Bounded):
    """Clips that are decoded by both decoders as a stream, for every sample.

    data: folder of encoded clips to measure, by default that of the training. ShapeWorld's clips are held out.
    clips: number of clips.
    shown: number of clips that are drawn; 0 draws none.
    """

    data: str | None = None
    clips: int = bounded(32, least=1)
    shown: int = bounded(4, least=0)


@dataclass(frozen=True)
class DecoderTraining(Bounded):
    """Configuration of `longvideo train decoder`.

    seed: seed of weights, data and noise.
    model: model folder whose autoencoder decodes the targets.
    data: folder of clips that `longvideo data encode` made with this model. By default clips of ShapeWorld are rendered
        and encoded on the device.
    initialize: decoder file to start from, such as `taew2_2.safetensors`; by default the weights are random.
    widths: channels at the input of each of the three stages of a decoder with random weights, and at the output of the
        last.
    export_dtype: number format of the exported weights.
    scenes: scenes of ShapeWorld that clips are rendered from.
    bank: pairs of latents and decoded pixels, kept on the device.
    windows: where windows begin.
    loss: terms of the loss.
    stages: runs of steps, one after another.
    optimizer: optimizer and its schedule.
    trainer: logs, samples and checkpoints.
    parallel: division over several processes.
    validation: clips that are measured.
    """

    seed: int = seed_field()
    model: str = "tiny"
    data: str | None = None
    initialize: str | None = None
    widths: tuple[int, ...] = bounded((192, 96, 48, 32), least=1)
    export_dtype: Literal["fp16", "fp32"] = "fp16"
    scenes: SceneConfig = field(default_factory=SceneConfig)
    bank: PairConfig = field(default_factory=PairConfig)
    windows: WindowConfig = field(default_factory=WindowConfig)
    loss: DistillationConfig = field(default_factory=DistillationConfig)
    stages: list[WindowStage] = field(default_factory=lambda: [WindowStage()])
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    validation: DecoderValidationConfig = field(default_factory=DecoderValidationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_stages(self.stages)
        if len(self.widths) != 4:
            raise ConfigError(f"widths is {list(self.widths)}; expected 4 numbers of channels, such as [128,64,48,32]")
        if self.parallel.sequence != 1:
            raise ConfigError(
                f"parallel.sequence is {self.parallel.sequence}; expected 1, since a decoder's windows are not divided"
            )
        if self.bank.generated_fraction and self.data is not None:
            raise ConfigError(
                f"bank.generated_fraction is {self.bank.generated_fraction}; expected 0 with data={self.data}, since"
                " clips are generated from captions of ShapeWorld"
            )


@dataclass(frozen=True)
class MeasuredClips:
    """Clips to decode: latents [N, C, T, H, W]; truth [N, 3, F, H, W] and mask [N, 1, F, H, W] where they are known."""

    latents: Tensor
    truth: Tensor | None = None
    mask: Tensor | None = None


class DecoderRecipe(Recipe[DecoderDistillation, WindowSource]):
    """Trains a small decoder: `longvideo train decoder`."""

    def __init__(self, config: DecoderTraining, device: torch.device, *, dry_run: bool = False) -> None:
        if dry_run:
            config = replace(config, bank=config.bank.of_dry_run())
        self.config = config
        self.device = device
        self.segments = [RateSegment(stage.steps, stage.learning_rate) for stage in config.stages]
        self.folder = ModelFolder.open(config.model)
        self.teacher = self.folder.load_vae(device=device, dtype=torch.float32).requires_grad_(False)
        student = self._build_student().to(device)
        self.compiles = config.loss.compile and not (launched() and config.parallel.zero_stage == 3)
        self.objective = DecoderDistillation(student, config.loss, device=device, compiled=self.compiles)
        self.dataset = None if config.data is None else self._open(config.data)
        held_out = config.validation.data
        self.held_out = self.dataset if held_out is None else self._open(held_out)
        bank = PairBank(
            self._footage(), self.teacher, config.bank, seed=config.seed, precision=config.trainer.precision
        )
        self.source = WindowSource(bank, config.stages, config.windows, seed=config.seed)

    @property
    def student(self) -> TinyDecoder:
        return self.objective.student

    def start(self, step: int) -> None:
        """Decode the clips of the bank."""
        self.source.start(step)

    def sample(self, step: int, folder: Path) -> dict[str, float]:
        """Decode clips with both decoders as a stream, compare them, print a table and draw strips of some clips."""
        from longvideo.evaluation.sheet import film_strip, write_picture

        distilled, small, full = Comparison(), Comparison(), Comparison()
        rows: list[tuple[str, np.ndarray]] = []
        num_clips, num_shown = 0, self.config.validation.shown
        for clips in self._measured():
            target = decode_clips(self.teacher, clips.latents, precision=self.config.trainer.precision)
            output = self.decode(clips.latents)
            regions = picture_regions(target) if clips.mask is None else object_regions(clips.mask)
            distilled.add(output, target, regions)
            if clips.truth is not None:
                small.add(output, clips.truth, regions)
                full.add(target, clips.truth, regions)
            for index in range(max(0, min(len(output), num_shown - num_clips))):
                truth = None if clips.truth is None else clips.truth[index]
                rows += strips(truth, target[index], output[index], number=num_clips + index)
            num_clips += len(output)
        if rows:
            captions, videos = zip(*rows, strict=True)
            folder.mkdir(parents=True, exist_ok=True)
            write_picture(film_strip(videos, columns=8, captions=captions), folder / f"decoder_{step:07d}.png")
        comparisons = {
            "val": ("small decoder from full decoder", distilled),
            "val_truth": ("small decoder from truth", small),
            "full_truth": ("full decoder from truth", full),
        }
        values = {prefix: sums.values() for prefix, (_, sums) in comparisons.items() if sums.psnr}
        rows_of_table = {comparisons[prefix][0]: numbers for prefix, numbers in values.items()}
        print(f"{num_clips} clips after step {step}\n{table(rows_of_table)}", flush=True)
        return {f"{prefix}_{name}": number for prefix, numbers in values.items() for name, number in numbers.items()}

    @torch.no_grad()
    def decode(self, latents_NCTHW: Tensor) -> Tensor:
        """Decode with the small decoder, chunk by chunk as a stream: float32, not clamped."""
        state, videos = None, []
        weight = next(self.student.parameters())
        for latents in latents_NCTHW.split(self.folder.settings.chunk_frames, dim=2):
            with autocast(self.config.trainer.precision, self.device):
                video, state = self.student.decode(latents.to(weight.dtype), state)
            videos.append(video.float())
        return torch.cat(videos, dim=2)

    def export(self, folder: Path) -> None:
        """Write decoder.safetensors with the names of TAEHV's weights."""
        save_decoder(
            folder, DECODER, self.student, model=str(self.config.model), dtype=DTYPES[self.config.export_dtype]
        )

    def facts(self) -> list[str]:
        widths = ", ".join(map(str, self.student.config.decoder_widths))
        parameters = sum(p.numel() for p in self.student.parameters()) / 1e6
        return [
            f"small decoder: widths {widths}, {parameters:.2f} M parameters",
            f"share of generated clips: {self.generated_fraction:g}",
            compile_fact(self.compiles, self.device),
        ]

    def next_steps(self, folder: Path) -> list[str]:
        decoder = folder / MODEL / f"{DECODER}.safetensors"
        command = ["longvideo", "generate", "a red ball bounces", "--model", self.config.model]
        command += ["--decoder", str(decoder), "-o", "ball.mp4"]
        return [f"decoder: {decoder}", f"next: {shlex.join(command)}"]

    def _build_student(self) -> TinyDecoder:
        config, vae = self.config, self.folder.vae_config
        if config.initialize is not None:
            decoder = open_decoder(Path(config.initialize), vae).load_decoder(dtype=torch.float32)
            if not isinstance(decoder, TinyDecoder):
                raise ConfigError(
                    f"initialize={config.initialize} is an autoencoder of Wan's form; expected a tiny decoder"
                )
            return decoder.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        first, second, third, last = config.widths
        shape = TinyAutoencoderConfig("base", z_dim=vae.z_dim, decoder_widths=(first, second, third, last))
        scales = (vae.scale_factor_temporal, vae.scale_factor_spatial)
        if scales != (shape.scale_factor_temporal, shape.scale_factor_spatial):
            raise ConfigError(
                f"the autoencoder of {config.model} makes {scales[0]} frames of {scales[1]} x {scales[1]} pixels from a"
                f" latent pixel; expected {shape.scale_factor_temporal} of {shape.scale_factor_spatial} x"
                f" {shape.scale_factor_spatial}, as a tiny decoder does"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            student = TinyDecoder(shape)
        conv_out = student.head[-1]
        assert isinstance(conv_out, nn.Conv2d) and conv_out.bias is not None
        nn.init.constant_(conv_out.bias, 0.5)  # gray, the middle of the pixels
        return student

    def _open(self, path: str) -> EncodedDataset:
        from longvideo.data.encoded import EncodedDataset

        dataset, channels = EncodedDataset.open(path), self.folder.vae_config.z_dim
        if dataset.channels != channels:
            raise ConfigError(
                f"{path} has latents of {dataset.channels} channels; expected {channels}, as the autoencoder of"
                f" {self.config.model}; encode with this model"
            )
        return dataset

    def _footage(self) -> LatentFootage:
        config, fraction = self.config, self.generated_fraction
        if self.dataset is not None:
            scale = self.folder.vae_config.scale_factor_spatial
            return EncodedFootage(self.dataset, config.bank, scale=scale, seed=config.seed, device=self.device)
        bank = self._latent_bank("train", config.scenes.count, seed=config.seed)
        if not fraction:
            return WorldFootage(bank)
        generated = GeneratedFootage(
            self.folder,
            bank.pool.scenes,
            chunks=config.bank.chunks,
            group=config.bank.group,
            seed=config.seed,
            device=self.device,
            precision=config.trainer.precision,
        )
        return MixedFootage(WorldFootage(bank), generated, generated_fraction=fraction)

    @property
    def generated_fraction(self) -> float:
        """Share of the groups of clips that the model generates."""
        config, settings = self.config, self.folder.settings
        size, own_size = (config.scenes.height, config.scenes.width), (settings.height, settings.width)
        fraction = config.bank.generated_fraction
        if fraction and size != own_size:
            raise ConfigError(
                f"scenes have {size[0]}x{size[1]} pixels; expected {own_size[0]}x{own_size[1]}, the size that"
                f" {config.model} generates; change scenes or set bank.generated_fraction=0"
            )
        if fraction is not None:
            return fraction
        whole = {TRANSFORMER, TEXT_ENCODER} <= set(self.folder.parts)
        generates = self.dataset is None and whole and settings.trained_on == WORLD_NAME and size == own_size
        return GENERATED_FRACTION if generates else 0.0

    def _latent_bank(self, split: Split, count: int, *, seed: int) -> LatentBank:
        """Return what encodes groups of ShapeWorld's clips; the clips that it could keep are not used."""
        config, scenes = self.config.bank, self.config.scenes
        drawn = sample_scenes(count, seed=self.config.seed, split=split, pair_fraction=scenes.pair_fraction)
        return LatentBank(
            self.teacher,
            ScenePool(drawn, height=scenes.height, width=scenes.width, device=self.device),
            BankConfig(
                clips=config.group,
                initial_clips=config.group,
                group=config.group,
                chunks=config.chunks,
                cut_fraction=config.cut_fraction,
                late_fraction=LATE_FRACTION,
                max_seconds=scenes.max_seconds,
            ),
            chunk_frames=self.folder.settings.chunk_frames,
            seed=seed,
            precision=self.config.trainer.precision,
        )

    @torch.no_grad()
    def _measured(self) -> Iterator[MeasuredClips]:
        """Yield the clips of the validation in groups, always the same ones."""
        config, group = self.config.validation, self.config.bank.group
        sizes = [min(group, config.clips - first) for first in range(0, config.clips, group)]
        if self.held_out is None:
            bank = self._latent_bank("heldout", config.clips, seed=0)
            for content, size in enumerate(sizes):
                plan = bank.plan(content)
                parts = [torch.cat(part, dim=2)[:size] for part in zip(*bank.render(plan), strict=True)]
                yield MeasuredClips(bank.encode(plan)[:size], truth=parts[0], mask=parts[1])
            return
        scale = self.folder.vae_config.scale_factor_spatial
        footage = EncodedFootage(self.held_out, self.config.bank, scale=scale, seed=0, device=self.device)
        for content, size in enumerate(sizes):
            yield MeasuredClips(footage.draw(content)[0][:size])


def strips(truth: Tensor | None, target: Tensor, output: Tensor, *, number: int) -> list[tuple[str, np.ndarray]]:
    """Return captions and frames uint8 [F, H, W, 3] of a clip's rows: truth, both decoders, and their difference.

    truth, target, output: [3, F, H, W]; target is the full decoder's video, output the small one's.
    """
    difference = DIFFERENCE_GAIN * (output.clamp(-1, 1) - target.clamp(-1, 1)).abs() - 1
    videos = {
        "truth": truth,
        "full decoder": target,
        "small decoder": output,
        f"{DIFFERENCE_GAIN} x difference": difference,
    }
    return [
        (f"{name} {number}", to_uint8(video[None])[0].cpu().numpy())
        for name, video in videos.items()
        if video is not None
    ]
