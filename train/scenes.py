"""A pool of ShapeWorld scenes on the training device, drawn from without the host.

B clips, T frames, S scenes of the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longvideo.errors import ConfigError
from longvideo.shapeworld.batch import SceneBatch
from longvideo.shapeworld.render import render_with_mask
from longvideo.shapeworld.world import Scene, Split, sample_scene

FPS = 24.0
CIRCLING = ("clockwise", "counterclockwise")
SEEDS_PER_RUN, SEEDS_PER_TRY = 10_000_000, 100_000


@dataclass(frozen=True)
class SceneConfig:
    """Which scenes are drawn, how large, and how far into their endless motion a clip may begin.

    pair_fraction: share of scenes with two sprites. circling_fraction: share of scenes that are redrawn until a sprite
    circles. At every single moment circling one way round looks as circling the other way, so this motion is the
    hardest to tell from its caption; chance gives 0.2 of single sprites.
    """

    count: int = 20000
    pair_fraction: float = 0.45
    circling_fraction: float = 0.0
    max_seconds: float = 60.0
    height: int = 128
    width: int = 224

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"scenes.count={self.count} must be at least 1")
        for name in ("pair_fraction", "circling_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"scenes.{name}={getattr(self, name)} must be from 0 to 1")


def sample_scenes(
    count: int, *, seed: int, split: Split, pair_fraction: float, circling_fraction: float = 0.0
) -> list[Scene]:
    """Draw scenes, each fraction of them evenly spread; see `SceneConfig`."""
    scenes = []
    for index in range(count):
        num_sprites = 2 if _has_turn(index, pair_fraction) else 1
        scene_seed = seed * SEEDS_PER_RUN + index
        scene = sample_scene(scene_seed, split=split, num_sprites=num_sprites)
        while _has_turn(index, circling_fraction) and not any(sprite.motion in CIRCLING for sprite in scene.sprites):
            scene_seed += SEEDS_PER_TRY
            scene = sample_scene(scene_seed, split=split, num_sprites=num_sprites)
        scenes.append(scene)
    return scenes


def _has_turn(index: int, fraction: float) -> bool:
    return int((index + 1) * fraction) > int(index * fraction)


class ScenePool:
    """Scenes as tensors on `device`; frames are drawn from them there."""

    def __init__(self, scenes: Sequence[Scene], *, height: int, width: int, device: torch.device):
        self.scenes = list(scenes)
        self.batch = SceneBatch.from_scenes(self.scenes).to(device)
        self.height, self.width = height, width
        self.device = device
        # compiled, a render is a few kernels; eager, it is some two hundred and waits for the host at every table
        self._render: Callable[..., tuple[Tensor, Tensor]] = (
            torch.compile(render_with_mask, dynamic=False) if device.type == "cuda" else render_with_mask
        )

    def __len__(self) -> int:
        return len(self.scenes)

    def draw(self, scene_BT: Tensor, seconds_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Draw frame by frame, so that a clip may cut anywhere: video [B, 3, T, H, W], soft mask [B, 1, T, H, W]."""
        batch, frames = scene_BT.shape
        flat = self.batch[scene_BT.flatten()]
        video, mask = self._render(flat, seconds_BT.reshape(-1, 1), height=self.height, width=self.width)
        return _to_clips(video, batch, frames), _to_clips(mask, batch, frames)


def frame_seconds(start_B: Tensor, num_frames: int) -> Tensor:
    """Return the times [B, T] of consecutive frames."""
    return start_B[:, None] + torch.arange(num_frames, device=start_B.device) / FPS


def _to_clips(frames: Tensor, batch: int, num_frames: int) -> Tensor:
    return frames.squeeze(2).unflatten(0, (batch, num_frames)).transpose(1, 2)
