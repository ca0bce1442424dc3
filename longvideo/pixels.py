"""Conversion between pixels of 8 bits and video in [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 127.5
"""Number of 8-bit levels for each unit of a video in [-1, 1]."""


def to_uint8(video_BCTHW: Tensor) -> Tensor:
    """Return pixels of a video in [-1, 1], rounded: uint8 [B, T, H, W, 3], contiguous, on the device of the video."""
    pixels = video_BCTHW.float().add(1).mul(LEVELS).round_().clamp_(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 4, 1).contiguous()


def from_uint8(pixels: Tensor) -> Tensor:
    """Return uint8 pixels as float32 in [-1, 1], in the same shape."""
    return pixels.float().div(LEVELS).sub(1)
