"""Operations of the video decoder, its convolutions in FP8 and the passes between convolutions: the definition.

Activations are [B, T, H, W, C] with C innermost: B samples, T frames, an H x W grid, C channels. The frames of a sample
are contiguous; samples need not be adjacent, since they may be parts of a buffer. Arithmetic is in the dtype of the
activations; `triton` computes in float32 and rounds what it stores.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from longvideo.kernels.nvfp4.format import E4M3_MAX

if TYPE_CHECKING:
    from longvideo.kernels.vae.format import FP8Kernel

SMALLEST_LENGTH = 1e-12
"""Lower bound of a length in the norm of the published autoencoder, which is that of `F.normalize`."""


def add_norm_silu(
    h: Tensor,
    bias: Tensor | None,
    x: Tensor | None,
    total: Tensor | None,
    gamma: Tensor | None = None,
    out: Tensor | None = None,
    inverse_scale: float = 1.0,
) -> None:
    """Write h + bias + x to total, which may be h or x, and SiLU(RMS norm of the unrounded sum) to out.

    bias: bias of the convolution that returned h without it, [C]. gamma: weight of the norm, [C]. inverse_scale: factor
    of the values in out, for E4M3. None leaves an operand out.
    """
    if bias is not None:
        h = h + bias
    if x is not None:
        h = torch.add(h, x, out=total)
    elif total is not None and total is not h:
        total.copy_(h)
    if gamma is not None:
        assert out is not None
        _norm_silu(h, gamma, out, inverse_scale)


def upsample_add_norm_silu(
    folded: Tensor,
    bias: Tensor,
    x: Tensor,
    offsets: tuple[int, int, int],
    times: int,
    total: Tensor,
    gamma: Tensor,
    out: Tensor,
    inverse_scale: float = 1.0,
) -> None:
    """Reorder a folded upsampling, add the shortcut around it and the bias, and normalize the sum.

    folded: result of the folded convolution, [B, T, H + 1, W + 1, 4 C], see `fold_upsampling`: pixel (2 i + a, 2 j + b)
        is at position (i + a, j + b), in phase 2 a + b.
    x: input of the shortcut, [B, T', H, W, C']. A frame of x stands for `times` frames of the result; an opening frame
        stands for the last of them alone.
    offsets: number of pixels in time, row and column that the channel groups of x hold; if it is 1 for an axis, the
        pixel is repeated.
    total, out: outputs for the sum and for SiLU of its norm, [B, T, 2 H, 2 W, C]. inverse_scale: factor of the values
        in out, for E4M3.
    """
    batch, frames, height, width, channels = total.shape
    height, width = height // 2, width // 2
    phases = folded.unflatten(-1, (2, 2, channels))
    repeated = x.unflatten(-1, (channels, *offsets)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    repeated = repeated.expand(batch, x.shape[1], times, height, 2, width, 2, channels)
    repeated = repeated.flatten(1, 2)[:, -frames:]  # [B, T, H, 2, W, 2, C]
    places = total.unflatten(3, (width, 2)).unflatten(2, (height, 2))
    for a in range(2):
        for b in range(2):
            pixels = phases[:, :, a : a + height, b : b + width, a, b]
            torch.add(pixels, repeated[:, :, :, a, :, b], out=places[:, :, :, a, :, b])
    total += bias
    _norm_silu(total, gamma, out, inverse_scale)


def to_pixels(packed: Tensor, bias: Tensor | None, patch: int, out: Tensor) -> None:
    """Write packed + bias, [B, T, H, W, 3 patch^2] in [-1, 1], as pixels, uint8 [B, T, patch H, patch W, 3].

    The channels of packed are color, column and row within a patch, in this order.
    """
    if bias is not None:
        packed = packed + bias
    pixels = packed.float().unflatten(-1, (3, patch, patch)).permute(0, 1, 2, 6, 3, 5, 4)
    pixels = pixels.flatten(4, 5).flatten(2, 3)
    out.copy_(pixels.add(1).mul(127.5).round_().clamp_(0, 255))


def convolve(inputs: Tensor, frames: int, kernel: FP8Kernel, out: Tensor) -> None:
    """Convolve values in E4M3 and write the scaled sums to out.

    inputs: float8_e4m3fn [B, T, H, W, C], with the zeros around each frame. Pixel (t, y, x) of the result depends on
        the pixels from (t, y, x) on, as many as there are taps; further frames are not read. frames: number of frames
        of the result. out: [B, frames, H - rows + 1, W - columns + 1, O] for rows x columns taps.
    """
    x = inputs[:, : frames + kernel.size[0] - 1].float().permute(0, 4, 1, 2, 3)
    sums = F.conv3d(x, kernel.weight()).permute(0, 2, 3, 4, 1)
    out.copy_(sums * kernel.scales)


def quantize(x: Tensor, out: Tensor) -> Tensor:
    """Write x in E4M3 to out, and return the scale, float32 []; the largest magnitude becomes 448."""
    amax = x.abs().amax().float()
    scale = torch.where(amax == 0, 1.0, amax / E4M3_MAX)
    out.copy_((x.float() / scale).clamp_(-E4M3_MAX, E4M3_MAX))
    return scale


def _norm_silu(x: Tensor, gamma: Tensor, out: Tensor, inverse_scale: float) -> None:
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(SMALLEST_LENGTH)
    is_fp8 = out.dtype == torch.float8_e4m3fn
    values = torch.empty_like(out, dtype=x.dtype) if is_fp8 else out
    torch.mul(x, math.sqrt(x.shape[-1]) / length, out=values)
    F.silu(values.mul_(gamma), inplace=True)
    if is_fp8:
        # torch's cast turns magnitudes above 448 into NaN
        out.copy_((values.float() * inverse_scale).clamp_(-E4M3_MAX, E4M3_MAX))
