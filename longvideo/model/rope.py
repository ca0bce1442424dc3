"""Rotary position embedding over time, height and width, from integer positions.

RoFormer (arXiv 2104.09864), divided among three axes as in Wan (arXiv 2503.20314). Angles are computed in float64 from
integers, without a table, so there is no last position. Shapes: B batch, L tokens, N heads, K head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

THETA = 10000.0


class Rope(NamedTuple):
    """Cosines and sines [B or 1, L, 1, K/2], float32."""

    cos: Tensor
    sin: Tensor


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Return the numbers of rotated pairs of time, height and width."""
    space = head_dim // 6
    return head_dim // 2 - 2 * space, space, space


def rope_from_positions(position_BL3: Tensor, head_dim: int) -> Rope:
    """Return the rotation of every token from its integer position (time, height, width)."""
    angles = []
    for axis, pairs in enumerate(axis_pairs(head_dim)):
        exponent = torch.arange(pairs, dtype=torch.float64, device=position_BL3.device) / pairs
        angles.append(position_BL3[..., axis, None].to(torch.float64) * THETA**-exponent)
    angle_BL1K = torch.cat(angles, dim=-1).unsqueeze(2)
    return Rope(angle_BL1K.cos().float(), angle_BL1K.sin().float())


def rotate(x_BLNK: Tensor, rope: Rope) -> Tensor:
    """Return queries or keys with rotated interleaved pairs, computed in float32 and returned in their dtype."""
    even, odd = x_BLNK.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * rope.cos - odd * rope.sin, even * rope.sin + odd * rope.cos), dim=-1)
    return rotated.flatten(-2).to(x_BLNK.dtype)
