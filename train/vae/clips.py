"""Batches for the autoencoder: ShapeWorld clips, whole or cropped around an object, in stages of growing length.

B clips, T frames, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.checkpoint.settings import VAE_SCALE
from longvideo.config.fields import Bounded, bounded, steps_field
from longvideo.errors import ConfigError
from longvideo.train.shapeworld.scenes import TEMPORAL_SCALE, ScenePool, frame_seconds
from longvideo.training.objective import seeded, stage_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longvideo.distributed import Mesh


@dataclass(frozen=True)
class ClipStage(Bounded):
    """A run of steps on clips of one shape.

    frames: number of pixel frames of a clip, 1 + 4k.
    height: height of the crop, a multiple of 16 pixels.
    width: width of the crop, a multiple of 16 pixels.
    batch: number of clips in a step.
    steps: number of steps.
    learning_rate: peak that replaces the optimizer's; 0 freezes the weights.
    """

    frames: int = bounded(1, least=1)
    height: int = bounded(128, least=16)
    width: int = bounded(224, least=16)
    batch: int = bounded(64, least=1)
    steps: int = steps_field(1000)
    learning_rate: float | None = bounded(None, least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames % TEMPORAL_SCALE != 1:
            near = self.frames // TEMPORAL_SCALE * TEMPORAL_SCALE + 1
            raise ConfigError(f"a stage has frames={self.frames}; expected 1 + {TEMPORAL_SCALE}k, such as {near}")
        for name in ("height", "width"):
            if getattr(self, name) % VAE_SCALE:
                raise ConfigError(f"a stage has {name}={getattr(self, name)}; expected a multiple of {VAE_SCALE}")


@dataclass(frozen=True)
class ClipBatch:
    """video [B, 3, T, H, W] in [-1, 1], mask [B, 1, T, H, W] in [0, 1], noise in the shape of the latents."""

    video: Tensor
    mask: Tensor
    noise: Tensor


class ReconstructionSource:
    """Clips of random scenes at random times; the share `cut_fraction` of the longer ones cuts to another scene."""

    unit = "frame"

    def __init__(
        self,
        pool: ScenePool,
        stages: Sequence[ClipStage],
        *,
        seed: int,
        max_seconds: float,
        cut_fraction: float,
        latent_channels: int,
    ) -> None:
        for stage in stages:
            if stage.height > pool.height or stage.width > pool.width:
                raise ConfigError(
                    f"a stage crops {stage.height}x{stage.width} from scenes of {pool.height}x{pool.width};"
                    " use a smaller crop"
                )
        self.pool = pool
        self.stages = list(stages)
        self.seed = seed
        self.max_seconds = max_seconds
        self.cut_fraction = cut_fraction
        self.latent_channels = latent_channels
        self.generator = torch.Generator(pool.device)

    def size(self, step: int) -> int:
        stage = stage_at(self.stages, step)
        return stage.batch * stage.frames

    def passes(self, _mesh: Mesh, _micro_batch: int | None) -> int:
        return 1

    def shares(self, step: int, mesh: Mesh, micro_batch: int | None) -> list[ClipBatch]:
        assert mesh.world == 1 and micro_batch is None, "the autoencoder is trained in one process"
        return [self.batch(step)]

    def batch(self, step: int) -> ClipBatch:
        stage = stage_at(self.stages, step)
        generator = seeded(self.generator, self.seed, "clips", step)
        video, mask = self.pool.draw(*self._draw(stage, generator))
        if (stage.height, stage.width) != (self.pool.height, self.pool.width):
            video, mask = crop_near_objects(video, mask, height=stage.height, width=stage.width, generator=generator)
        latents = (1 + stage.frames // TEMPORAL_SCALE, stage.height // VAE_SCALE, stage.width // VAE_SCALE)
        noise = self._rand_normal((stage.batch, self.latent_channels, *latents), generator)
        return ClipBatch(video.contiguous(), mask.contiguous(), noise)

    def _draw(self, stage: ClipStage, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Choose the scene and the time of every frame, [B, T] each."""
        shape = (stage.batch, 1)
        first, second = (self._rand_index(shape, generator) for _ in range(2))
        first_start, second_start = (self._rand(stage.batch, generator) * self.max_seconds for _ in range(2))
        if stage.frames == 1:
            return first, frame_seconds(first_start, 1)
        cuts = self._rand(stage.batch, generator) < self.cut_fraction
        cut_at = torch.where(cuts, self._rand(stage.batch, generator) * (stage.frames - 1) + 1, stage.frames)
        after = torch.arange(stage.frames, device=self.pool.device) >= cut_at[:, None].floor()
        seconds = torch.where(
            after, frame_seconds(second_start, stage.frames), frame_seconds(first_start, stage.frames)
        )
        return torch.where(after, second, first), seconds

    def _rand(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.rand(count, generator=generator, device=self.pool.device)

    def _rand_normal(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, device=self.pool.device)

    def _rand_index(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randint(len(self.pool), shape, generator=generator, device=self.pool.device)


def crop_near_objects(
    video: Tensor, mask: Tensor, *, height: int, width: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Crop every clip at a place of its own that contains a random pixel of an object in its middle frame."""
    batch, _, frames, full_height, full_width = mask.shape
    device = mask.device
    middle = mask[:, 0, frames // 2].flatten(1)
    lottery = torch.rand(middle.shape, generator=generator, device=device)
    pixel = ((middle + 1e-3) * lottery).argmax(1)
    jitter = torch.rand(2, batch, generator=generator, device=device)
    # the position of the chosen pixel in the crop is uniform, as far as the border of the frame allows
    top = (pixel // full_width - jitter[0] * height).round().clamp(0, full_height - height).long()
    left = (pixel % full_width - jitter[1] * width).round().clamp(0, full_width - width).long()
    rows = top[:, None] + torch.arange(height, device=device)
    columns = left[:, None] + torch.arange(width, device=device)
    clip = torch.arange(batch, device=device)[:, None, None]

    def crop(x: Tensor) -> Tensor:
        return x.permute(0, 3, 4, 1, 2)[clip, rows[:, :, None], columns[:, None, :]].permute(0, 3, 4, 1, 2)

    return crop(video), crop(mask)
