"""The NVFP4 format: 4-bit E2M1 codes, an E4M3 scale for every 16 of them, one float32 scale for the tensor.

A value is `code x (group scale x tensor scale)`. A byte holds two codes, the first in the low nibble, as in torchao and
TransformerEngine. Source: NVIDIA, "Pretraining Large Language Models with NVFP4" (arXiv 2509.25149).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

GROUP = 16
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_TINY = 2.0**-6  # the smallest normal number, and the smallest scale a group gets
ADAPTIVE_SCALE_MAX = 256.0  # 1.5 times this scale is still an E4M3 number
# the smallest tensor scale: no reciprocal overflows, and quotients of the smallest numbers are representable
TENSOR_SCALE_MIN = 2.0**-112
# signs of the 16-point random Hadamard transform; any fixed choice works, this one is that of TransformerEngine
HADAMARD_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


class Rule(str, Enum):
    """Rule by which the scale of a group is chosen.

    static6, static4: the largest magnitude of the group becomes 6, or 4.
    adaptive, adaptive-abs, adaptive-max: both are tried and the one with the lower squared, absolute or largest error
        is used, or 6 if the errors are equal ("four over six", arXiv 2512.02010).
    """

    STATIC6 = "static6"
    STATIC4 = "static4"
    ADAPTIVE = "adaptive"
    ADAPTIVE_ABS = "adaptive-abs"
    ADAPTIVE_MAX = "adaptive-max"

    @property
    def is_adaptive(self) -> bool:
        return self not in (Rule.STATIC6, Rule.STATIC4)

    @property
    def largest_product(self) -> float:
        """Product of the largest code and the largest group scale; it represents a tensor's largest magnitude."""
        if self is Rule.STATIC4:
            return 4.0 * E4M3_MAX
        return E2M1_MAX * (ADAPTIVE_SCALE_MAX if self.is_adaptive else E4M3_MAX)

    @property
    def smallest_amax(self) -> float:
        """Lower bound of the largest magnitude of a tensor, so that its scale is not too small."""
        return self.largest_product * TENSOR_SCALE_MIN


@dataclass(frozen=True)
class NVFP4Tensor:
    """A quantized tensor whose groups run along the last dimension.

    codes: uint8 [..., K/2], two codes a byte.
    scales: float8_e4m3fn [..., K/16]; a tile of 16 x 16 repeats its scale in all 16 rows.
    tensor_scale: float32, a scalar or a tensor that broadcasts against scales.
    """

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor

    def __post_init__(self) -> None:
        shape = (*self.codes.shape[:-1], self.codes.shape[-1] * 2 // GROUP)
        if self.scales.shape != shape or self.codes.shape[-1] * 2 % GROUP:
            raise ValueError(f"codes {list(self.codes.shape)} need scales {list(shape)}; got {list(self.scales.shape)}")
        dtypes = (self.codes.dtype, self.scales.dtype, self.tensor_scale.dtype)
        if dtypes != (torch.uint8, torch.float8_e4m3fn, torch.float32):
            raise ValueError(f"codes, scales and tensor scale are {dtypes}; expected uint8, float8_e4m3fn and float32")

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor that is represented."""
        return torch.Size((*self.codes.shape[:-1], self.codes.shape[-1] * 2))

    @property
    def num_bytes(self) -> int:
        parts = (self.codes, self.scales, self.tensor_scale)
        return sum(part.numel() * part.element_size() for part in parts)


@dataclass(frozen=True)
class ExactOperand:
    """A quantized tensor as the numbers `code x group scale`, for products on hardware without FP4 units.

    values: the numbers, exact in bfloat16, since the product of an E2M1 and an E4M3 number has six significant bits.
    tensor_scale: float32; the tensor represents `values x tensor_scale`.
    """

    values: Tensor
    tensor_scale: Tensor


def check_groups(shape: torch.Size, *, tile_rows: int = 1) -> None:
    """Raise ValueError for a shape that is not made of whole groups of 16, and of whole tiles if tile_rows is 16."""
    if not shape or shape[-1] % GROUP:
        raise ValueError(
            f"the shape is {list(shape)}; expected a last dimension that is a multiple of {GROUP}, the NVFP4 group"
        )
    if tile_rows not in (1, GROUP):
        raise ValueError(f"tile_rows={tile_rows}; expected 1 or {GROUP}")
    if tile_rows == GROUP and (len(shape) != 2 or shape[0] % GROUP):
        raise ValueError(f"the shape is {list(shape)}; expected a matrix with rows in multiples of {GROUP} for tiles")
