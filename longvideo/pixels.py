"""Pixels of 8 bits: their conversion from and to video in [-1, 1], and the measure of their difference."""

from __future__ import annotations

import math
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

LEVELS = 127.5
"""Number of 8-bit levels for each unit of a video in [-1, 1]."""
PEAK = 255
"""Largest 8-bit level."""


def to_uint8(video_BCTHW: Tensor) -> Tensor:
    """Return pixels of a video in [-1, 1], rounded: uint8 [B, T, H, W, 3], contiguous, on the device of the video."""
    pixels = video_BCTHW.float().add(1).mul(LEVELS).round_().clamp_(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 4, 1).contiguous()


def from_uint8(pixels: Tensor) -> Tensor:
    """Return uint8 pixels as float32 in [-1, 1], in the same shape."""
    return pixels.float().div(LEVELS).sub(1)


def psnr(errors: Sequence[float]) -> float:
    """Return the peak signal-to-noise ratio of mean squared differences in dB; infinity if there is no difference."""
    mean = fmean(errors) if errors else 0.0
    return math.inf if mean == 0 else 10 * math.log10(PEAK**2 / mean)
