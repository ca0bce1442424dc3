"""Q-EMA: rounding to the one of the two numbers around a value that is nearer to its running average.

Source: "Oscillation-Reduced MXFP4 Training for Vision Transformers" (TetraJet, arXiv 2502.20853), section 5 and
algorithm 1. The scales are those of the value, not of the average. As in the authors' code, the two numbers are the one
at or below the magnitude and the next one, and a magnitude of 6 or more becomes 6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longvideo.kernels.nvfp4.format import E2M1_MAX, GROUP, ExactOperand, Rule
from longvideo.kernels.nvfp4.rounding import e2m1_step, round_to_groups


def round_toward_average(x: Tensor, average: Tensor, rule: Rule, *, tile_rows: int, dtype: torch.dtype) -> ExactOperand:
    """Round x, of which there is an average of the same shape, with the scales of `reference.quantize`.

    Where the average is equally near to both numbers, or is x itself, the result is that of rounding to nearest.
    """
    nearest, scales, tensor_scale = round_to_groups(x, rule, tile_rows, None, None, None)
    scale = (scales.float() * tensor_scale).unsqueeze(-1)
    # an adaptive rule may give a group the scale zero, which represents nothing but zero
    scaled, scaled_average = (
        torch.where(scale > 0, values.float().unflatten(-1, (-1, GROUP)) / scale, 0.0) for values in (x, average)
    )
    other = _other_neighbor(scaled, nearest)
    nearer = (scaled_average - other).abs() < (scaled_average - nearest).abs()
    values = torch.where(nearer, other, nearest) * scales.float().unsqueeze(-1)
    return ExactOperand(values.flatten(-2).to(dtype), tensor_scale)


def _other_neighbor(scaled: Tensor, nearest: Tensor) -> Tensor:
    """Return the E2M1 number on the other side of a scaled value; 6 for a magnitude of 6 or more."""
    magnitude = scaled.abs().clamp_max(E2M1_MAX)
    step = e2m1_step(magnitude)
    below = torch.floor(magnitude / step) * step
    above = (below + step).clamp_max(E2M1_MAX)
    return torch.copysign(torch.where(nearest.abs() == below, above, below), scaled)
