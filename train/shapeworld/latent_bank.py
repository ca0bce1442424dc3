"""Latents of ShapeWorld clips, kept on the training device and replaced a group at a time (see `ClipBank`).

Shapes: N clips, C channels, T latent frames, H W latent grid, Q chunks of a clip.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.config.fields import bounded, share
from longvideo.errors import ConfigError
from longvideo.train.bank import ClipBank, GroupConfig
from longvideo.train.shapeworld.scenes import FPS, TEMPORAL_SCALE, ScenePool
from longvideo.training.objective import seeded
from longvideo.training.precision import TrainingPrecision, autocast

if TYPE_CHECKING:
    from collections.abc import Iterator

    from longvideo.vae.autoencoder import Autoencoder


@dataclass(frozen=True)
class BankConfig(GroupConfig):
    """Encoded clips on the device, of which a group is replaced now and then.

    clips: number of clips that the bank holds.
    initial_clips: number of clips that are encoded before the first step.
    group: number of clips that are encoded at once.
    refresh_every: number of steps between two groups.
    chunks: number of chunks of a clip.
    cut_fraction: share of clips with one or two cuts, all of them between chunks.
    recolor_fraction: share of the other clips in which an object takes another color between two chunks.
    late_fraction: share of the clips of a group, but not of all of them, that begin later than their first scene. A
        caption describes how a scene begins, so these clips serve only as the middle of a video. All other shots begin
        at second 0.
    max_seconds: latest time within its first scene at which such a clip begins.
    """

    chunks: int = bounded(4, least=1)
    cut_fraction: float = share(0.35)
    recolor_fraction: float = share(0.0)
    late_fraction: float = bounded(0.4, least=0, below=1)
    max_seconds: float = bounded(60.0, least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recolor_fraction and self.chunks < 2:
            raise ConfigError(f"bank.chunks is {self.chunks}; expected at least 2, because of bank.recolor_fraction")


@dataclass(frozen=True)
class ClipPlan:
    """Scenes, cuts and times of a group of clips.

    scene: scene that each chunk shows, [N, Q]. cut: whether a chunk opens a shot after another one, [N, Q].
    start_seconds: time of a chunk's scene at the clip's first frame, [N, Q]. late, recolored: [N].
    """

    scene: Tensor
    cut: Tensor
    start_seconds: Tensor
    late: Tensor
    recolored: Tensor


class LatentBank(ClipBank):
    """Encoded clips on the device.

    latents: [N, C, T, H, W] float16, normalized. scene: rows of the pool, [N, Q]. cut: whether a chunk opens a shot
    after another one, [N, Q]. late, recolored: [N].
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        pool: ScenePool,
        config: BankConfig,
        *,
        chunk_frames: int,
        seed: int,
        precision: TrainingPrecision,
    ) -> None:
        super().__init__(config, pool.device)
        self.autoencoder = autoencoder
        self.pool = pool
        self.config = config
        self.chunk_frames = chunk_frames
        self.seed = seed
        self.precision: TrainingPrecision = precision
        scale = autoencoder.config.scale_factor_spatial
        frames = config.chunks * chunk_frames
        shape = (config.clips, autoencoder.config.z_dim, frames, pool.height // scale, pool.width // scale)
        self.latents = torch.zeros(shape, dtype=torch.float16, device=pool.device)
        self.scene = torch.zeros(config.clips, config.chunks, dtype=torch.long, device=pool.device)
        self.cut = torch.zeros(config.clips, config.chunks, dtype=torch.bool, device=pool.device)
        self.late, self.recolored = torch.zeros(2, config.clips, dtype=torch.bool, device=pool.device)
        self.generator = torch.Generator(pool.device)
        # views of one chunk need a clip in each group that is not late
        self.num_late = min(round(config.late_fraction * config.group), config.group - 1)

    def draw_opening(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw clips that are not late, [count]; the late ones are the first of every group."""
        group, device = self.config.group, self.pool.device
        row = torch.randint(self.filled // group, (count,), generator=generator, device=device)
        return row * group + torch.randint(self.num_late, group, (count,), generator=generator, device=device)

    @torch.no_grad()
    def write(self, content: int, place: slice) -> None:
        plan = self.plan(content)
        self.latents[place] = self.encode(plan)
        self.scene[place] = plan.scene
        self.cut[place] = plan.cut
        self.late[place] = plan.late
        self.recolored[place] = plan.recolored

    def plan(self, content: int) -> ClipPlan:
        """Draw the scenes, cuts and times of a group."""
        generator = seeded(self.generator, self.seed, "bank", content)
        device, count, chunks = self.pool.device, self.config.group, self.config.chunks

        def rand(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, device=device)

        rank = rand(count, chunks - 1).argsort(1).argsort(1)
        num_cuts = (rand(count, 1) < self.config.cut_fraction) * (1 + (rand(count, 1) < 0.4).long())
        cut = torch.cat((torch.zeros(count, 1, dtype=torch.bool, device=device), rank < num_cuts), dim=1)
        shot = cut.long().cumsum(1)
        scenes = torch.randint(self.pool.count, (count, chunks), generator=generator, device=device)
        late = torch.arange(count, device=device) < self.num_late
        number = torch.arange(chunks, device=device)
        opening_chunk = (number * cut).cummax(1).values
        frames_before = (opening_chunk * self.chunk_frames * TEMPORAL_SCALE - (TEMPORAL_SCALE - 1)).clamp(min=0)
        seconds = torch.where(shot == 0, (late * rand(count))[:, None] * self.config.max_seconds, -frames_before / FPS)
        scene = scenes.gather(1, shot)
        recolored = (rand(count) < self.config.recolor_fraction) & (num_cuts[:, 0] == 0)
        if self.config.recolor_fraction:
            at = torch.randint(1, chunks, (count, 1), generator=generator, device=device)
            scene = torch.where(recolored[:, None] & (number >= at), self.pool.other_color(scene), scene)
        return ClipPlan(scene=scene, cut=cut, start_seconds=seconds, late=late, recolored=recolored)

    @torch.no_grad()
    def encode(self, plan: ClipPlan) -> Tensor:
        """Render and encode clips chunk by chunk, as a stream: normalized mean latents [N, C, T, H, W], float32."""
        state, latents = None, []
        for video, _ in self.render(plan):
            with autocast(self.precision, self.pool.device):
                moments, state = self.autoencoder.encode(video, state)
            latents.append(self.autoencoder.normalize(moments.float().chunk(2, dim=1)[0]))
        return torch.cat(latents, dim=2)

    def render(self, plan: ClipPlan) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the video [N, 3, F, H, W] and the soft mask [N, 1, F, H, W] of each chunk."""
        begin = 0
        for chunk in range(plan.scene.shape[1]):
            frames = self.chunk_frames * TEMPORAL_SCALE - (TEMPORAL_SCALE - 1 if chunk == 0 else 0)
            clock = (begin + torch.arange(frames, device=self.pool.device)) / FPS
            seconds = plan.start_seconds[:, chunk, None] + clock
            yield self.pool.draw(plan.scene[:, chunk, None].expand(-1, frames), seconds)
            begin += frames
