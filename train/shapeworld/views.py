"""Batches for the transformer: views of consecutive chunks of the bank's clips, captions, noise levels and noise.

Shapes: B views, C channels, T latent frames of a view, H W latent grid, Q chunks of a view, S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.config.fields import Bounded, bounded, share
from longvideo.distributed import Mesh, common_passes, divide_batch
from longvideo.errors import ConfigError
from longvideo.train.batch import ViewBatch, ViewStage
from longvideo.training.objective import seeded, stage_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longvideo.flow.schedule import FlowSchedule
    from longvideo.train.shapeworld.captions import TokenTable
    from longvideo.train.shapeworld.latent_bank import LatentBank


@dataclass(frozen=True)
class ViewConfig(Bounded):
    """What is taken from a clip, and how much noise it gets.

    A view in which an object takes another color has the caption of its last chunk in all chunks, as a session whose
    past is seen under a new prompt (`recache`). Its chunks before the change are context alone.

    start_fraction: share of views that begin where their video begins. The first chunk of other views is context alone.
    prompt_dropout: share of views with an empty prompt, for guidance.
    context_noise_fraction: share of context chunks that get noise.
    context_noise_max: largest noise level of the context; the model is not given the level.
    image_fraction: share of the views that begin a video whose first latent frame is given, for image to video.
    phrasings: number of captions of each scene.
    caption_omit: share of captions that leave out the sizes, and of those that leave out the background.
    wrong_color: share of the chunks that continue a scene whose caption names a wrong color for one object.
    """

    start_fraction: float = share(0.65)
    prompt_dropout: float = share(0.1)
    context_noise_fraction: float = share(0.7)
    context_noise_max: float = share(0.15)
    image_fraction: float = share(0.1)
    phrasings: int = bounded(6, least=1)
    caption_omit: float = share(0.1)
    wrong_color: float = share(0.0)


class ViewSource:
    """Views drawn on the device, as a function of seed and step."""

    unit = "tok"

    def __init__(
        self,
        bank: LatentBank,
        tokens: TokenTable,
        stages: Sequence[ViewStage],
        config: ViewConfig,
        schedule: FlowSchedule,
        *,
        seed: int,
        tokens_per_chunk: int,
    ) -> None:
        for stage in stages:
            if stage.chunks > bank.config.chunks:
                raise ConfigError(
                    f"a stage has chunks={stage.chunks}; expected at most {bank.config.chunks}, which is bank.chunks"
                )
        self.bank = bank
        self.tokens = tokens
        self.stages = list(stages)
        self.config = config
        self.seed = seed
        self.device = bank.latents.device
        self.sigmas = schedule.sigmas.to(self.device, torch.float32)
        self.generator = torch.Generator(self.device)
        self.tokens_per_chunk = tokens_per_chunk

    def start(self, step: int) -> None:
        self.bank.start(step)

    def size(self, step: int) -> int:
        """Return the clean latent tokens of a batch; the noisy copy does not count."""
        stage = stage_at(self.stages, step)
        return stage.batch * stage.chunks * self.tokens_per_chunk

    def passes(self, mesh: Mesh, micro_batch: int | None) -> int:
        return common_passes(divide_batch(stage.batch, mesh, micro_batch)[1] for stage in self.stages if stage.steps)

    def shares(self, step: int, mesh: Mesh, micro_batch: int | None) -> list[ViewBatch]:
        return self.batch(step).shares(mesh, micro_batch, self.bank.chunk_frames)

    def batch(self, step: int) -> ViewBatch:
        """Draw the views of a whole step."""
        self.bank.advance(step)
        config, stage, frames_per_chunk = self.config, stage_at(self.stages, step), self.bank.chunk_frames
        count, chunks, frames = stage.batch, stage.chunks, stage.chunks * frames_per_chunk
        generator = seeded(self.generator, self.seed, "views", step)

        def rand(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, device=self.device)

        def index(limit: int, *shape: int) -> Tensor:
            return torch.randint(limit, shape, generator=generator, device=self.device)

        if chunks == 1:
            clip = self.bank.draw_opening(count, generator)
            first_chunk = torch.zeros(count, dtype=torch.long, device=self.device)
        else:
            clip = index(self.bank.filled, count)
            latest = self.bank.config.chunks - chunks
            opening = (rand(count) < config.start_fraction) & ~self.bank.late[clip]
            first_chunk = torch.where(opening | (latest == 0), 0, 1 + index(max(1, latest), count))
        opening = (first_chunk == 0) & ~self.bank.late[clip]
        frame = first_chunk[:, None] * frames_per_chunk + torch.arange(frames, device=self.device)
        clean = self.bank.latents[clip[:, None], :, frame].transpose(1, 2).float()

        place = clip[:, None], first_chunk[:, None] + torch.arange(chunks, device=self.device)
        shown, cut = self.bank.scene[place], self.bank.cut[place].long()
        captioned = torch.where(self.bank.recolored[clip, None], shown[:, -1:], shown)
        phrasing = index(self.tokens.phrasings, count, 1)
        dropped = (rand(count) < config.prompt_dropout)[:, None, None]

        sigma = self.sigmas[index(len(self.sigmas), count, chunks)].repeat_interleave(frames_per_chunk, dim=1)
        context_sigma = (rand(count, chunks) < config.context_noise_fraction) * rand(count, chunks)
        context_sigma = (config.context_noise_max * context_sigma).repeat_interleave(frames_per_chunk, dim=1)
        loss_mask = torch.ones(count, frames, device=self.device)
        loss_mask[:, :frames_per_chunk] = opening[:, None].float()
        is_given = opening & (rand(count) < config.image_fraction)
        sigma[:, 0] = torch.where(is_given, 0.0, sigma[:, 0])
        loss_mask[:, 0] = torch.where(is_given, 0.0, loss_mask[:, 0])
        loss_mask *= (captioned == shown).repeat_interleave(frames_per_chunk, dim=1)

        noise, context_noise = (torch.randn(clean.shape, generator=generator, device=self.device) for _ in range(2))
        if config.wrong_color:
            wrong = (rand(count, chunks - 1) < config.wrong_color) & (shown[:, 1:] == shown[:, :-1])
            wrong &= ~self.bank.recolored[clip, None]
            captioned[:, 1:] = torch.where(wrong, self.bank.pool.other_color(captioned[:, 1:]), captioned[:, 1:])
        ids = torch.where(dropped, self.tokens.empty_ids, self.tokens.ids[cut, captioned, phrasing])
        mask = torch.where(dropped, self.tokens.empty_mask, self.tokens.mask[cut, captioned, phrasing])
        return ViewBatch(
            clean, noise, context_noise, sigma, context_sigma, loss_mask, ids, mask, None, mean_weight=loss_mask.sum()
        )
