"""From a model's video to what is shown."""

from __future__ import annotations

import torch
from torch import Tensor


def to_uint8(video_BCTHW: Tensor) -> Tensor:
    """Map [-1, 1] to 0..255 with rounding: [B, 3, T, H, W] -> uint8 [B, T, H, W, 3], contiguous, on its device."""
    pixels = video_BCTHW.float().add(1).mul(127.5).round_().clamp_(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 4, 1).contiguous()
