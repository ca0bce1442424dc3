"""MS-EDEN: rounding to nearest, whose bias a random scale of each group removes.

Source: "Quartet II: Accurate LLM Pre-Training in NVFP4 by Improved Unbiased Gradient Estimation" (arXiv 2601.22813),
section 3.3 and Algorithm 1. The mean is taken over the signs of a random Hadamard transform and over the rounding of
the scales; with fixed signs the result is biased. Its squared error is less than half of that of stochastic rounding.
The bias vanishes as the number of points grows: with 128 points it is below 1 % of a Gaussian vector, and 4 % of a
vector whose largest value is 100 times as large as the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longvideo.kernels.nvfp4.codes import encode, pack
from longvideo.kernels.nvfp4.format import E2M1_MAX, E4M3_MAX, E4M3_TINY, GROUP, TENSOR_SCALE_MIN, NVFP4Tensor
from longvideo.kernels.nvfp4.hadamard import random_hadamard
from longvideo.kernels.nvfp4.rounding import largest_magnitude, to_nearest

POINTS = 128
"""Number of points of the transform before the rounding."""
SCALE_MAX = 256.0
"""Largest group scale before the correction, which may increase it; the largest E4M3 number is 448."""
CLIP = E2M1_MAX * (16 / 17) / 0.93
"""Magnitude to which the largest value of a group is mapped. At 6 x 16/17 nothing is clipped, since rounding to E4M3
makes a scale smaller by up to 1/17; a group with a scale larger by 1/0.93 clips, and has the lowest squared error."""


def quantize_ms_eden(x: Tensor, signs: Tensor | None, draw: Tensor) -> NVFP4Tensor:
    """Transform the last dimension, which must be a multiple of 128, and round it.

    Both operands of a product need the same signs, and draws that are independent.

    signs: random numbers that are 1 or -1, float32 [128]. draw: random numbers in [0, 1), float32 [..., K / 16].
    Raises ValueError without signs, since the fixed ones of the transform would make the result biased.
    """
    if signs is None:
        raise ValueError("MS-EDEN is biased with fixed signs; expected signs that are redrawn in every step")
    rotated = random_hadamard(x, POINTS, signs=signs)
    groups = rotated.float().unflatten(-1, (-1, GROUP))
    amax = largest_magnitude(rotated).clamp_min(CLIP * SCALE_MAX * TENSOR_SCALE_MIN)
    tensor_scale = amax / (CLIP * SCALE_MAX)
    exact_scale = groups.abs().amax(-1) / (CLIP * tensor_scale)
    scale = exact_scale.clamp(E4M3_TINY, SCALE_MAX).to(torch.float8_e4m3fn).float()
    scaled = groups / (scale * tensor_scale).unsqueeze(-1)
    values = to_nearest(scaled.clamp(-E2M1_MAX, E2M1_MAX))
    corrected = (scale * _correction(scaled, values)).clamp(0.0, E4M3_MAX)
    return NVFP4Tensor(pack(encode(values)).view(*x.shape[:-1], -1), _stochastic_e4m3(corrected, draw), tensor_scale)


def _correction(scaled: Tensor, values: Tensor) -> Tensor:
    """Return <x, x> / <x, Q(x)> of every group [..., G, 16]; 1 for a group that is rounded to zero."""
    product = (scaled * values).sum(-1)
    return torch.where(product > 0, scaled.square().sum(-1) / product.clamp_min(E4M3_TINY), 1.0)


def _stochastic_e4m3(x: Tensor, draw: Tensor) -> Tensor:
    """Round numbers in [0, 448] to one of the two nearest E4M3 numbers, whose mean is exact. draw: in [0, 1)."""
    nearest = x.to(torch.float8_e4m3fn)
    # E4M3 numbers that are not negative have the order of their bytes
    lower = nearest.view(torch.uint8) - (nearest.float() > x).to(torch.uint8)
    low = lower.view(torch.float8_e4m3fn).float()
    high = (lower + (low < x).to(torch.uint8)).view(torch.float8_e4m3fn).float()
    up = draw * (high - low) < x - low
    return torch.where(up, high, low).to(torch.float8_e4m3fn)
