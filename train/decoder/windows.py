"""Batches for the small decoder: consecutive latent frames of the bank's clips, the frames before them, and pixels.

Shapes: B windows, C channels, P latent frames before a window, T latent frames of a window, F pixel frames, H W grid.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.config.fields import Bounded, bounded, share, steps_field
from longvideo.distributed import Mesh, common_passes, divide_batch
from longvideo.errors import ConfigError
from longvideo.training.objective import seeded, stage_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longvideo.train.decoder.pairs import PairBank


@dataclass(frozen=True)
class WindowStage(Bounded):
    """A run of steps on windows of one length.

    steps: number of steps.
    batch: number of windows in a step, over all ranks.
    frames: number of latent frames of a window.
    learning_rate: peak that replaces the optimizer's; 0 freezes the weights.
    """

    steps: int = steps_field(6000)
    batch: int = bounded(16, least=1)
    frames: int = bounded(8, least=1)
    learning_rate: float | None = bounded(None, least=0)


@dataclass(frozen=True)
class WindowConfig(Bounded):
    """Where windows begin.

    opening_fraction: share of windows that begin where their video begins, if their clip does.
    warmup: number of latent frames before any other window that the decoders are given; their pixels have no loss.
    """

    opening_fraction: float = share(0.25)
    warmup: int = bounded(4, least=1)


@dataclass(frozen=True)
class WindowBatch:
    """A rank's share of one pass.

    past: latents before the window, [B, C, P, H, W]. latents: [B, C, T, H, W]. pixels: of the full decoder, [B, 3, F,
    H, W] with F = 4 T. opening: whether the window begins a video, so that `past` does not belong to it, [B]. weight: 1
    for pixel frames that count, [B, F]. mean_weight: sum of the weights over all shares of a step, divided by their
    number, so that the mean of all shares' losses does not depend on how a step is divided.
    """

    past: Tensor
    latents: Tensor
    pixels: Tensor
    opening: Tensor
    weight: Tensor
    mean_weight: Tensor


class WindowSource:
    """Windows drawn on the device, as a function of seed and step."""

    unit = "frame"

    def __init__(self, bank: PairBank, stages: Sequence[WindowStage], config: WindowConfig, *, seed: int) -> None:
        most = bank.footage.num_frames - config.warmup
        for stage in stages:
            if stage.frames > most:
                raise ConfigError(
                    f"a stage has frames={stage.frames}; expected at most {most}, the latent frames of a clip"
                    f" ({bank.footage.num_frames}) without windows.warmup={config.warmup}; use a larger bank.chunks"
                )
        self.bank = bank
        self.stages = list(stages)
        self.config = config
        self.seed = seed
        self.generator = torch.Generator(bank.device)

    def start(self, step: int) -> None:
        self.bank.start(step)

    def size(self, step: int) -> int:
        """Return the number of pixel frames of a batch."""
        stage = stage_at(self.stages, step)
        return stage.batch * stage.frames * self.bank.time_scale

    def passes(self, mesh: Mesh, micro_batch: int | None) -> int:
        return common_passes(divide_batch(stage.batch, mesh, micro_batch)[1] for stage in self.stages if stage.steps)

    def shares(self, step: int, mesh: Mesh, micro_batch: int | None) -> list[WindowBatch]:
        whole = self.batch(step)
        size, passes = divide_batch(len(whole.opening), mesh, micro_batch)
        mean_weight = whole.mean_weight / (mesh.world * passes)

        def part(number: int) -> WindowBatch:
            first = (mesh.replica * passes + number) * size
            names = [field.name for field in fields(WindowBatch) if field.name != "mean_weight"]
            rows = {name: getattr(whole, name)[first : first + size] for name in names}
            return WindowBatch(**rows, mean_weight=mean_weight)

        return [part(number) for number in range(passes)]

    def batch(self, step: int) -> WindowBatch:
        """Draw the windows of a whole step."""
        bank = self.bank
        bank.advance(step)
        stage, warmup = stage_at(self.stages, step), self.config.warmup
        count, device = stage.batch, bank.device
        generator = seeded(self.generator, self.seed, "windows", step)

        def index(limit: int) -> Tensor:
            return torch.randint(limit, (count,), generator=generator, device=device)

        clip = index(bank.filled)
        later = warmup + index(bank.footage.num_frames - stage.frames - warmup + 1)
        at_opening = torch.rand(count, generator=generator, device=device) < self.config.opening_fraction
        opening = at_opening & bank.opening[clip]
        first = torch.where(opening, 0, later)[:, None]
        frame = first + torch.arange(-warmup, stage.frames, device=device)
        latents = bank.latents[clip[:, None], frame.clamp(min=0)].transpose(1, 2).float()
        pixel = first * bank.time_scale + torch.arange(stage.frames * bank.time_scale, device=device)
        weight = torch.ones(pixel.shape, device=device)
        weight[:, : bank.time_scale - 1] = (~opening[:, None]).float()
        return WindowBatch(
            past=latents[:, :, :warmup],
            latents=latents[:, :, warmup:],
            pixels=bank.pixels[clip[:, None], pixel].permute(0, 4, 1, 2, 3).float(),
            opening=opening,
            weight=weight,
            mean_weight=weight.sum(),
        )
