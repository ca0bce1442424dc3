"""DGE, the differentiable gradient estimator: a derivative for rounding to E2M1 instead of one everywhere.

Source: "Optimizing Large Language Model Training Using FP4 Quantization" (arXiv 2501.17116), section 3.1, equations 7
and 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longvideo.kernels.nvfp4.format import E2M1_MAX, Rule
from longvideo.kernels.nvfp4.rounding import e2m1_step, round_to_groups

SHARPNESS = 5.0
"""Exponent k: the larger, the closer the smooth function is to the rounding."""
LARGEST_DERIVATIVE = 3.0


def derivative(x: Tensor) -> Tensor:
    """Return the derivative of the smooth function that replaces rounding to E2M1, at the scaled values x, float32.

    In an interval of width d between two E2M1 numbers, at the distance t from the lower one, it is
    1/k |2 t/d - 1|^(1/k - 1), at most 3. Values that are clipped have the derivative at the end, 1/k.
    """
    magnitude = x.abs().clamp_max(E2M1_MAX)
    step = e2m1_step(magnitude)
    position = magnitude / step - torch.floor(magnitude / step)
    slope = (2 * position - 1).abs().pow(1 / SHARPNESS - 1) / SHARPNESS
    return slope.clamp_max(LARGEST_DERIVATIVE)


def weight_derivative(weight_OI: Tensor, rule: Rule, *, tile_rows: int) -> Tensor:
    """Return the derivative of the rounding of every weight, float32; the gradient of a weight is multiplied by it.

    rule, tile_rows: those of the forward product. The scales of groups are treated as constants.
    """
    _, scales, tensor_scale = round_to_groups(weight_OI, rule, tile_rows, None, None, None)
    scale = (scales.float() * tensor_scale).unsqueeze(-1)
    groups = weight_OI.float().view(*scales.shape, -1)
    # an adaptive rule may give a group the scale zero, which represents nothing but zero
    scaled = torch.where(scale > 0, groups / scale, 0.0)
    return derivative(scaled).view(weight_OI.shape)
