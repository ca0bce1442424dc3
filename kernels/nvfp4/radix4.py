"""Radix-4 FP4 with two-phase rounding and GradScale: gradients as powers of four, rounded to nearest.

Source: X. Sun et al., "Ultra-Low Precision 4-bit Training of Deep Neural Networks" (NeurIPS 2020). A number of four
bits has a sign and three bits of exponent; its magnitude is zero or one of 4^-3, 4^-2, ..., 4^3. The gradient of the
input uses these numbers and that of the weight their doubles, so that a gradient that one of the products rounds up is
often rounded down in the other.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from longvideo.kernels.nvfp4.format import TENSOR_SCALE_MIN, ExactOperand
from longvideo.kernels.nvfp4.rounding import EXPONENT_BITS, largest_magnitude

SMALLEST, LARGEST = 4.0**-3, 4.0**3
LAST_EXPONENT_BIT = 1 << 23


class Phase(Enum):
    """Phase of two-phase rounding; its value is the factor of the powers of four."""

    EVEN = 1.0
    ODD = 2.0


def quantize_radix4_exact(x: Tensor, phase: Phase, *, dtype: torch.dtype = torch.bfloat16) -> ExactOperand:
    """Round x times `settled_scale` of its largest magnitude to the nearest number of a phase."""
    scale = settled_scale(largest_magnitude(x))
    magnitude = (x.float() * scale).abs() / phase.value
    values = _to_power_of_four(magnitude) * phase.value
    return ExactOperand(torch.copysign(values, x.float()).to(dtype), scale.reciprocal())


def next_scale(scale: Tensor, amax: Tensor) -> Tensor:
    """Return GradScale's next scale of a layer: half if the scaled gradient overflows, double if it underflows.

    scale: present scale. amax: largest magnitude of the layer's gradient. The scaled amax is to be in (32, 64].
    """
    scaled = scale * amax
    return torch.where(scaled > LARGEST, scale / 2, torch.where(scaled <= LARGEST / 2, scale * 2, scale))


def settled_scale(amax: Tensor) -> Tensor:
    """Return the power of two that `next_scale` reaches if a layer's gradient keeps its largest magnitude.

    A training layer uses it, so that a step depends on nothing but its inputs and seeds.
    """
    mantissa, exponent = torch.frexp(amax.clamp_min(TENSOR_SCALE_MIN))
    # amax is mantissa x 2^exponent with a mantissa in [1/2, 1); of 1/2 itself the double is the largest that fits
    return torch.ldexp(LARGEST * torch.where(mantissa == 0.5, 2.0, 1.0), -exponent)


def _to_power_of_four(magnitude: Tensor) -> Tensor:
    """Round to zero or a power of four from 4^-3 to 4^3; the limit of 4^(n-1) and 4^n is 4^n / 1.6, their mean."""
    bounded = magnitude.clamp(SMALLEST, LARGEST)
    bits = bounded.view(torch.int32) & EXPONENT_BITS
    # float32 stores exponent + 127: for an odd exponent the last bit is 0, and the power of four is half as large
    bits = bits - (LAST_EXPONENT_BIT - (bits & LAST_EXPONENT_BIT))
    lower = bits.view(torch.float32)
    nearest = torch.where(bounded > 2.5 * lower, 4 * lower, lower)
    return torch.where(magnitude > SMALLEST / 2, nearest, 0.0)
