"""OCC, outlier clamping and compensation: a few large inputs are multiplied in 16 bits instead of 4.

Source: "Optimizing Large Language Model Training Using FP4 Quantization" (arXiv 2501.17116), section 3.2, equation 9.
The quantile is that of |x|, as in the paper's text on magnitudes, so the limits are the same on both sides.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def split_outliers(x: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Return x clamped at a quantile of its magnitudes, and the rest, which is zero except for outliers.

    quantile: share of the values that are not clamped, in (0, 1]; the paper uses 0.99 to 0.999.
    Raises ValueError for another quantile.
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"the quantile of outliers is {quantile}; expected a share in (0, 1]")
    magnitude = x.abs().flatten()
    # the smallest of the largest values; topk neither sorts them nor waits for the device
    count = magnitude.numel() - math.ceil(quantile * magnitude.numel()) + 1
    limit = torch.topk(magnitude, count, sorted=False).values.amin()
    clamped = torch.minimum(torch.maximum(x, -limit), limit)
    return clamped, x - clamped
