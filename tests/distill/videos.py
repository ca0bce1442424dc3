"""A small backbone with both adapters, and clips for it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from longvideo.checkpoint.settings import ModelSettings
from longvideo.distill.objectives import DmdConfig, NoisyCopies
from longvideo.distill.roles import LoraRoles, LoraSettings, Role
from longvideo.distill.self_forcing import RolloutConfig, SelfForcing
from longvideo.distill.walk import VideoRequest
from longvideo.model.cache import ChunkCache, KVCache
from longvideo.model.spec import ChunkSpec
from longvideo.model.transformer import CausalTransformer
from tests.model import small

SPEC = ChunkSpec(
    grid_height=2, grid_width=3, chunk_frames=2, window_frames=6, sink_frames=2, pin_shots=True, offset_per_shot=4
)
SHAPE = (small.CONFIG.in_channels, SPEC.chunk_frames, 2 * SPEC.grid_height, 2 * SPEC.grid_width)


def cache_of(model: CausalTransformer, cache_type: type[ChunkCache], batch: int) -> ChunkCache:
    return cache_type(model.cache_sizes(SPEC, batch=batch))


def roles(
    student: CausalTransformer,
    teacher: CausalTransformer | None = None,
    *,
    stirred: float = 0.0,
    cache_type: type[ChunkCache] = KVCache,
) -> LoraRoles:
    """stirred: size of random updates in both adapters, which start at none."""
    roles = LoraRoles(
        student.requires_grad_(False),
        LoraSettings(rank=4, alpha=8.0),
        teacher=None if teacher is None else teacher.requires_grad_(False),
        new_cache=partial(cache_of, student, cache_type),
    )
    generator = torch.Generator().manual_seed(7)
    for role in (Role.STUDENT, Role.CRITIC):
        for name, weight in roles.trained(role).items():
            if name.endswith(".lora_B"):
                weight.data = stirred * torch.randn(weight.shape, generator=generator).to(weight.device)
    return roles


def parts(
    roles: LoraRoles, rollout: RolloutConfig | None = None, dmd: DmdConfig | None = None
) -> tuple[SelfForcing, NoisyCopies]:
    rollout = rollout or RolloutConfig(steps=3)
    clean_pass = rollout.distilled(ModelSettings()).clean_pass
    rollouts = SelfForcing(roles, rollout, spec=SPEC, shape=SHAPE, shift=3.0, seed=0, clean_pass=clean_pass)
    return rollouts, NoisyCopies(rollouts, dmd or DmdConfig(), guidance=2.0, shift=3.0, seed=0)


def clip(
    cuts: tuple[bool, ...] = (True, False, False), *, samples: int = 2, first_latent: Tensor | None = None
) -> VideoRequest:
    shots = torch.tensor(cuts).long().cumsum(0) - 1
    return VideoRequest(
        features_PJD=small.features(int(shots[-1]) + samples + 1),
        prompt_NB=shots[:, None] + torch.arange(samples),
        cuts=cuts,
        samples=tuple(range(samples)),
        step=0,
        first_latent=first_latent,
    )
