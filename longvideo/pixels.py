"""Conversion of decoded video to pixels."""

from __future__ import annotations

import torch
from torch import Tensor


def to_uint8(video_BCTHW: Tensor) -> Tensor:
    """Return pixels of a video in [-1, 1], rounded: uint8 [B, T, H, W, 3], contiguous, on the device of the video."""
    pixels = video_BCTHW.float().add(1).mul(127.5).round_().clamp_(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 4, 1).contiguous()
