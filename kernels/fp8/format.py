"""FP8 (E4M3, E5M2) with a float32 scale for each row or tensor: OCP 8-bit Floating Point Specification 1.0."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longvideo.kernels.nvfp4.format import E4M3_MAX

SCALE_MIN = 2.0**-126  # the smallest normal float32: a smaller scale would lose bits, or be zero

SIZE_MULTIPLE = 16
"""Number of which the sizes of a product's operands are multiples, on tensor cores."""

__all__ = ["E4M3_MAX", "SCALE_MIN", "SIZE_MULTIPLE", "FP8Rows", "FP8Tensor"]


@dataclass(frozen=True)
class FP8Rows:
    """Rows [..., K] in E4M3 with a scale each. They represent `values * scales[..., None]`.

    values: float8_e4m3fn [..., K]. scales: float32 [...].
    """

    values: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        if self.scales.shape != self.values.shape[:-1]:
            raise ValueError(
                f"values {list(self.values.shape)} need scales {list(self.values.shape[:-1])}; "
                f"got {list(self.scales.shape)}"
            )
        dtypes = (self.values.dtype, self.scales.dtype)
        if dtypes != (torch.float8_e4m3fn, torch.float32):
            raise ValueError(f"values and scales are {dtypes}; expected float8_e4m3fn and float32")

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor that is represented."""
        return self.values.shape


@dataclass(frozen=True)
class FP8Tensor:
    """A matrix in E4M3 or E5M2 with one scale. It represents `values * scale`.

    values: float8_e4m3fn or float8_e5m2. scale: float32 scalar.
    """

    values: Tensor
    scale: Tensor
