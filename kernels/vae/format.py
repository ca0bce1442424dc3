"""FP8 weights of a convolution; the OCP 8-bit Floating Point Specification 1.0 defines E4M3."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from longvideo.kernels.nvfp4.format import E4M3_MAX

DEPTH_MULTIPLE = 128
"""The input channels of every tap are filled with zeros to a multiple of this number."""
CHANNEL_MULTIPLE = 16
"""A convolution in FP8 needs a multiple of this number of input channels: the copy engine reads 16 bytes at a time."""


@dataclass(frozen=True)
class FP8Kernel:
    """Weights of a convolution in E4M3, with a scale for each output channel.

    values: float8_e4m3fn [O, taps x depth], with the input channels innermost, filled with zeros to `depth`.
    scales: float32 [O], the scale of the weights times that of the input. inverse_scale: reciprocal of the scale of the
    input, a power of two. size: number of taps in time, rows and columns. channels: number of input channels.
    """

    values: Tensor
    scales: Tensor
    inverse_scale: float
    size: tuple[int, int, int]
    channels: int

    @classmethod
    def quantize(cls, weight_OITHW: Tensor, *, bound: float) -> FP8Kernel:
        """Round weights to nearest; the largest magnitude of each output channel becomes 448.

        bound: upper bound of the magnitudes of the input, from which its scale follows.
        Raises ValueError for a number of input channels that is not a multiple of CHANNEL_MULTIPLE.
        """
        _, channels, *size = weight_OITHW.shape
        if channels % CHANNEL_MULTIPLE:
            raise ValueError(
                f"the convolution has {channels} input channels; expected a multiple of {CHANNEL_MULTIPLE}"
            )
        inverse_scale = 2.0 ** math.floor(math.log2(E4M3_MAX / bound)) if bound else 1.0
        rows = weight_OITHW.detach().float().permute(0, 2, 3, 4, 1)
        amax = rows.abs().flatten(1).amax(1)
        scales = torch.where(amax == 0, 1.0, amax / E4M3_MAX)
        values = F.pad(rows / scales.view(-1, 1, 1, 1, 1), (0, -channels % DEPTH_MULTIPLE)).flatten(1)
        return cls(
            values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn),
            scales / inverse_scale,
            inverse_scale,
            (size[0], size[1], size[2]),
            channels,
        )

    def weight(self) -> Tensor:
        """Return the rounded weights without their scales, float32 [O, I, T, H, W]."""
        taps = self.values.float().view(len(self.values), *self.size, -1)[..., : self.channels]
        return taps.permute(0, 4, 1, 2, 3)
