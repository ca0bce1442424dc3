"""The random Hadamard transform, which spreads an outlier over 16, 64 or 128 values.

Applied to both operands of a product along the summed dimension, it does not change the product.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from longvideo.kernels.nvfp4 import draws
from longvideo.kernels.nvfp4.format import GROUP, HADAMARD_SIGNS

HADAMARD_POINTS = (16, 64, 128)
"""Numbers of points that a transform may have. arXiv 2509.25149 uses 16, arXiv 2601.22813 uses 128."""


def random_hadamard(x: Tensor, points: int = GROUP, *, signs: Tensor | None = None) -> Tensor:
    """Apply the orthogonal transform to every `points` consecutive values of the last dimension, after sign flips.

    points: 16, 64 or 128; the last dimension must be a multiple of it.
    signs: 1 or -1 for each point, float32 [points] or a shape that broadcasts against [..., K / points, points]; by
        default fixed ones.
    It is computed in float32 by the fast transform, whose order of sums a kernel can repeat, and rounded to the dtype
    of x. Raises ValueError for other numbers of points and for shapes that are not made of whole transforms.
    """
    if points not in HADAMARD_POINTS:
        raise ValueError(f"the Hadamard transform has {points} points; expected one of {HADAMARD_POINTS}")
    if not x.ndim or x.shape[-1] % points:
        raise ValueError(f"the shape is {list(x.shape)}; expected a last dimension that is a multiple of {points}")
    out = x.float().unflatten(-1, (-1, points)) * (fixed_signs(points, x.device) if signs is None else signs)
    for _ in range(points.bit_length() - 1):
        # the lowest bit of the index becomes the highest, so that after all rounds the values are in order again
        even, odd = out[..., ::2], out[..., 1::2]
        out = torch.cat((even + odd, even - odd), dim=-1)
    return (out * points**-0.5).flatten(-2).to(x.dtype)


# outside inference mode: a tensor made inside it could not be multiplied under autograd later
@functools.cache
@torch.inference_mode(False)
def fixed_signs(points: int, device: torch.device) -> Tensor:
    """Return the signs of a transform that does not redraw them, float32 [points]."""
    if points == GROUP:
        return torch.tensor(HADAMARD_SIGNS, dtype=torch.float32, device=device)
    return draws.signs(torch.tensor(0), points).to(device)
