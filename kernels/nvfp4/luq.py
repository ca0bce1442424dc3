"""LUQ, logarithmic unbiased quantization: gradients as powers of two, E3M0, with one scale for the tensor.

Source: "Accurate Neural Training with 4-bit Matrix Multiplications at Standard Formats" (arXiv 2112.10769), section 4,
equations 10 to 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longvideo.kernels.nvfp4.format import TENSOR_SCALE_MIN, ExactOperand
from longvideo.kernels.nvfp4.rounding import EXPONENT_BITS, largest_magnitude

LARGEST = 64.0
"""Largest of the seven magnitudes 1, 2, 4, ..., 64 that E3M0 has besides zero."""


def quantize_luq_exact(x: Tensor, draw: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> ExactOperand:
    """Round to zero or a power of two from 1 to 64, times max |x| / 64, so that the mean over draws is exact.

    A magnitude below the smallest becomes the smallest or zero, another one a neighboring power of two, with
    probabilities that are linear in it.

    draw: random numbers in [0, 1) with the shape of x, float32.
    """
    alpha = (largest_magnitude(x) / LARGEST).clamp_min(TENSOR_SCALE_MIN)
    magnitude = (x.float() / alpha).abs().clamp_max(LARGEST)
    octave = (magnitude.view(torch.int32) & EXPONENT_BITS).view(torch.float32)
    lower = torch.where(magnitude < 1.0, 0.0, octave)
    step = octave.clamp_min(1.0)
    values = lower + step * (draw * step < magnitude - lower)
    return ExactOperand(torch.copysign(values, x.float()).to(dtype), alpha)
