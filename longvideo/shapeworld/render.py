"""Render ShapeWorld in pure torch, batched over scenes and times, on any device.

B scenes, T times, N sprites, H W pixels. Each pixel depends only on scene and time, so a frame that is rendered alone
equals the same frame of a clip.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from longvideo.shapeworld.batch import SceneBatch
from longvideo.shapeworld.geometry import signed_distance
from longvideo.shapeworld.motion import compute_poses
from longvideo.shapeworld.world import BACKGROUNDS, WORLD_HEIGHT

__all__ = ["SceneBatch", "foreground_mask", "render", "render_backgrounds", "render_with_mask"]

EDGE_PIXELS = 1.5
"""Width of the soft edge in pixels: more than one, so that motion of less than a pixel is visible."""
TILE = 32.0
"""Side of a checkerboard tile in world units: two latents of 16 pixels at height 128."""


def render(batch: SceneBatch, times_BT: Tensor, *, height: int = 128, width: int = 224) -> Tensor:
    """Render scenes: float32 [B, 3, T, H, W] in [-1, 1]. times_BT: seconds. height, width: pixels."""
    return render_with_mask(batch, times_BT, height=height, width=width)[0]


def render_with_mask(
    batch: SceneBatch, times_BT: Tensor, *, height: int = 128, width: int = 224
) -> tuple[Tensor, Tensor]:
    """Render scenes as `render` does; also return the soft foreground mask [B, 1, T, H, W] in [0, 1]."""
    covers = _coverage(batch, times_BT, height=height, width=width)
    backgrounds = render_backgrounds(height, width, device=times_BT.device)
    video = backgrounds[batch.background_B][:, :, None]
    for i, cover in enumerate(covers):
        color = batch.color_BN3[:, i, :, None, None, None]
        video = torch.lerp(video.expand(-1, -1, times_BT.shape[1], -1, -1), color, cover[:, None])
    return video, _union(covers)[:, None]


def foreground_mask(batch: SceneBatch, times_BT: Tensor, *, height: int = 128, width: int = 224) -> Tensor:
    """Return the fraction of each pixel that sprites cover: [B, 1, T, H, W] in [0, 1]."""
    return _union(_coverage(batch, times_BT, height=height, width=width))[:, None]


def render_backgrounds(height: int, width: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Render all backgrounds in the order of BACKGROUNDS: float32 [6, 3, H, W] in [-1, 1]."""
    unit = WORLD_HEIGHT / height
    x = (torch.arange(width, device=device) + 0.5) * unit
    y = (torch.arange(height, device=device) + 0.5) * unit
    down = (y / WORLD_HEIGHT)[:, None].expand(height, width)
    odd = (torch.floor(x / TILE)[None] + torch.floor(y / TILE)[:, None]) % 2
    nothing = torch.zeros_like(down)
    pictures = {
        "black": _blend(nothing, (10, 10, 12), (10, 10, 12)),
        "gray": _blend(nothing, (122, 122, 126), (122, 122, 126)),
        "cream": _blend(nothing, (243, 234, 214), (243, 234, 214)),
        "night": _blend(down, (6, 9, 34), (44, 50, 104)),
        "meadow": _blend(down, (58, 86, 58), (24, 50, 26)),
        "checkerboard": _blend(odd, (46, 54, 66), (78, 90, 106)),
    }
    return torch.stack([pictures[name] for name in BACKGROUNDS])


def _coverage(batch: SceneBatch, times_BT: Tensor, *, height: int, width: int) -> list[Tensor]:
    """Return the fraction of each pixel that every sprite covers: N tensors [B, T, H, W]."""
    unit = WORLD_HEIGHT / height
    world_width = width * unit
    poses = compute_poses(batch, times_BT, width=world_width)
    pixel_x = (torch.arange(width, device=times_BT.device) + 0.5) * unit
    pixel_y = (torch.arange(height, device=times_BT.device) + 0.5) * unit
    covers = []
    for i in range(batch.present_BN.shape[1]):
        center_x = poses.x_BTN[:, :, i, None, None].float()
        center_y = poses.y_BTN[:, :, i, None, None].float()
        distance = signed_distance(
            _nearest_on_torus(pixel_x - center_x, world_width),
            _nearest_on_torus(pixel_y[:, None] - center_y, WORLD_HEIGHT),
            outline_BF=batch.outline_BNF[:, i],
            radius=poses.radius_BTN[:, :, i, None, None].float(),
            angle=poses.angle_BTN[:, :, i, None, None].float(),
        )
        cover = (0.5 - distance / (unit * EDGE_PIXELS)).clamp(0, 1)
        covers.append(cover * batch.present_BN[:, i, None, None, None])
    return covers


def _nearest_on_torus(offset: Tensor, size: float) -> Tensor:
    """Return the shortest offset on a torus, so that a sprite that crosses an edge is visible on both sides."""
    return offset - size * torch.round(offset / size)


def _union(covers: list[Tensor]) -> Tensor:
    """Return the union of covers. Sprites never overlap, so it is the maximum."""
    return functools.reduce(torch.maximum, covers)


def _blend(weight_HW: Tensor, first: tuple[int, int, int], second: tuple[int, int, int]) -> Tensor:
    """Mix two 8-bit colors: [3, H, W] in [-1, 1]. It uses Python numbers, so no tensor is copied from the host."""
    channels = [(low + (high - low) * weight_HW) / 127.5 - 1 for low, high in zip(first, second, strict=True)]
    return torch.stack(channels)
