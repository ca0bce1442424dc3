"""Points in the plane in place of videos: every latent frame is a point, networks are small, densities are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from longvideo.distill.roles import Role
from longvideo.distill.walk import VideoRequest
from longvideo.flow.schedule import expand
from longvideo.model.cache import KVCache
from longvideo.model.layout import TokenLayout
from longvideo.model.rope import Rope
from longvideo.model.slots import CacheSizes
from longvideo.model.spec import ChunkSpec
from longvideo.model.transformer import TextContext

CPU = torch.device("cpu")
POINTS = 64  # of a sample
SPEC = ChunkSpec(grid_height=1, grid_width=1, chunk_frames=POINTS, window_frames=POINTS, sink_frames=0, pin_shots=False)
SHAPE = (2, POINTS, 1, 1)


class Mixture:
    """A mixture of round Gaussians: its samples, and its exact denoiser."""

    def __init__(self, centres: Tensor, deviation: float) -> None:
        self.centres, self.deviation = centres, deviation

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Return points [count, 2]."""
        which = torch.randint(len(self.centres), (count,), generator=generator)
        return self.centres[which] + self.deviation * torch.randn(count, 2, generator=generator)

    def x0(self, x_BCTHW: Tensor, sigma_BT: Tensor) -> Tensor:
        """Return the mean of clean points given noisy ones, by Bayes' rule."""
        points = x_BCTHW[..., 0, 0].double().movedim(1, -1)  # [B, T, 2]
        sigma = sigma_BT.double()[..., None]
        variance = ((1 - sigma) * self.deviation) ** 2 + sigma**2
        offsets = points[..., None, :] - (1 - sigma[..., None]) * self.centres.double()  # [B, T, M, 2]
        share = (-offsets.square().sum(-1) / (2 * variance)).softmax(-1)[..., None]
        gain = ((1 - sigma) * self.deviation**2 / variance)[..., None]
        estimate = (share * (self.centres.double() + gain * offsets)).sum(-2)
        return estimate.movedim(-1, 1)[..., None, None].to(x_BCTHW.dtype)


class PointNetwork(nn.Module):
    """The interface of a transformer around the velocity of points."""

    def rope(self, _layout: TokenLayout) -> Rope:
        return Rope(torch.empty(0), torch.empty(0))

    def encode_text(self, features_PJD: Tensor) -> TextContext:
        return TextContext((features_PJD,), (features_PJD,))

    def fill_cache(self, *_: Any, **__: Any) -> None:
        raise AssertionError("a clip of one chunk has no chunk after it")

    def forward(self, x: Tensor, sigma_BT: Tensor, _text: TextContext, **_: Any) -> Tensor:
        raise NotImplementedError


class Exact(PointNetwork):
    """The velocity of a known density."""

    def __init__(self, x0: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.x0 = x0

    def forward(self, x: Tensor, sigma_BT: Tensor, _text: TextContext, **_: Any) -> Tensor:
        return (x - self.x0(x, sigma_BT)) / expand(sigma_BT)


class Learned(PointNetwork):
    """A small network of point and noise level that predicts velocities."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 9, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor, sigma_BT: Tensor, _text: TextContext, **_: Any) -> Tensor:
        points = x[..., 0, 0].movedim(1, -1)
        angles = sigma_BT[..., None] * torch.tensor([0.5, 1.0, 2.0, 4.0]) * torch.pi
        h = torch.cat((points, sigma_BT[..., None], angles.cos(), angles.sin()), dim=-1)
        return self.out(self.layers(h)).movedim(-1, 1)[..., None, None]


class ThreeNetworks:
    """Roles that are networks of their own."""

    device = CPU

    def __init__(self, student: PointNetwork, critic: PointNetwork, teacher: PointNetwork) -> None:
        self.networks = {Role.STUDENT: student, Role.CRITIC: critic, Role.TEACHER: teacher.requires_grad_(False)}

    def switch(self, role: Role) -> PointNetwork:
        return self.networks[role]

    def trained(self, role: Role) -> dict[str, nn.Parameter]:
        return dict(self.networks[role].named_parameters())

    def new_cache(self, _role: Role, _batch: int) -> KVCache:
        return KVCache(CacheSizes(SPEC, num_layers=0, num_heads=1, head_dim=2))


def clip(step: int, samples: int = 16) -> VideoRequest:
    return VideoRequest(
        features_PJD=torch.zeros(2, 1, 1),
        prompt_NB=torch.zeros(1, samples, dtype=torch.int64),
        cuts=(True,),
        samples=tuple(range(samples)),
        step=step,
    )
