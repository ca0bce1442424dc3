"""A pool of ShapeWorld scenes on the training device; frames are rendered there, without the host.

B clips, T frames, S scenes of the pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.checkpoint.settings import VAE_SCALE
from longvideo.config.fields import Bounded, bounded, share
from longvideo.errors import ConfigError
from longvideo.shapeworld.batch import SceneBatch
from longvideo.shapeworld.render import render_with_mask

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from longvideo.shapeworld.world import Scene

FPS = 24.0
TEMPORAL_SCALE = 4
"""Number of pixel frames in a latent frame; the first latent frame of a video holds one."""
MOST_PIXELS = 4096
"""Largest height and width of a frame."""


@dataclass(frozen=True)
class SceneConfig(Bounded):
    """The scenes that clips are rendered from.

    count: number of scenes.
    pair_fraction: share of scenes with two objects.
    max_seconds: latest time within the endless motion of a scene at which a clip begins.
    height: height of the frames, pixels; a multiple of 16, the side of a latent pixel.
    width: width of the frames, pixels; a multiple of 16.
    """

    count: int = bounded(20000, least=1)
    pair_fraction: float = share(0.45)
    max_seconds: float = bounded(60.0, least=0)
    height: int = bounded(128, least=1, most=MOST_PIXELS)
    width: int = bounded(224, least=1, most=MOST_PIXELS)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("height", self.height), ("width", self.width)):
            if value % VAE_SCALE:
                raise ConfigError(f"scenes.{name} is {value}; expected a multiple of {VAE_SCALE}")


class ScenePool:
    """Scenes as tensors on `device`; frames are rendered from them there.

    recolored: for each scene the same one with an object in another color, or nothing; they follow the `count` others.
    """

    def __init__(
        self,
        scenes: Sequence[Scene],
        *,
        height: int,
        width: int,
        device: torch.device,
        recolored: Sequence[Scene] = (),
    ) -> None:
        assert len(recolored) in (0, len(scenes)), (len(recolored), len(scenes))
        self.count = len(scenes)
        self.scenes = [*scenes, *recolored]
        self.batch = SceneBatch.from_scenes(self.scenes).to(device)
        self.height, self.width = height, width
        self.device = device
        # a compiled render is a few kernels; an eager one is about 200 kernels and waits for the host at every table
        self._render: Callable[..., tuple[Tensor, Tensor]] = (
            torch.compile(render_with_mask, dynamic=False) if device.type == "cuda" else render_with_mask
        )

    def __len__(self) -> int:
        return len(self.scenes)

    def other_color(self, scene: Tensor) -> Tensor:
        """Return the scenes that differ from these in a color."""
        assert len(self) == 2 * self.count, "no recolored scenes"
        return (scene + self.count) % len(self)

    def draw(self, scene_BT: Tensor, seconds_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Render frame by frame, so that a clip may cut anywhere: video [B, 3, T, H, W], soft mask [B, 1, T, H, W]."""
        batch, frames = scene_BT.shape
        flat = self.batch[scene_BT.flatten()]
        video, mask = self._render(flat, seconds_BT.reshape(-1, 1), height=self.height, width=self.width)
        return _to_clips(video, batch, frames), _to_clips(mask, batch, frames)


def frame_seconds(start_B: Tensor, num_frames: int) -> Tensor:
    """Return the times [B, T] of consecutive frames."""
    return start_B[:, None] + torch.arange(num_frames, device=start_B.device) / FPS


def _to_clips(frames: Tensor, batch: int, num_frames: int) -> Tensor:
    return frames.squeeze(2).unflatten(0, (batch, num_frames)).transpose(1, 2)
