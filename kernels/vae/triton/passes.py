"""Triton kernels between the convolutions of the video decoder; `reference` defines them.

Activations are [B, T, H, W, C] with C innermost; the frames of a sample are contiguous. Only the normalized result may
have other pixels around each frame, which are the zeros of a convolution. Every kernel reads and writes each value
once. The norm is over the channels of a pixel, all of which are in one program.
"""

# a kernel is launched with options and plain constants, which its function does not declare
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from longvideo.kernels.nvfp4.format import E4M3_MAX
from longvideo.kernels.nvfp4.triton.arithmetic import round_to
from longvideo.kernels.vae.reference import SMALLEST_LENGTH

if TYPE_CHECKING:
    from torch import Tensor

VALUES = 8192
"""Number of values in a program: the channels of as many pixels as fit."""
WARPS = 8

_SMALLEST_LENGTH = tl.constexpr(SMALLEST_LENGTH)


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

    inverse_scale: factor of the values in out, for E4M3.
    Bytes moved, where E is the size of an element: E for each element of h, x, total and out, if not None.
    Raises ValueError for activations of different shapes, and for pixels that are not contiguous.
    """
    batch, rows, channels = _check("h", h, h)
    for name, other in (("x", x), ("total", total)):
        if other is not None:
            _check(name, other, h)
    if out is not None:
        _check_rows("out", out, h)
    width = triton.next_power_of_2(channels)
    block = max(1, VALUES // width)
    _add_norm_silu[(triton.cdiv(rows, block), batch)](
        h,
        h if bias is None else bias,
        h if x is None else x,
        h if total is None else total,
        h if gamma is None else gamma,
        h if out is None else out,
        inverse_scale,
        rows,
        channels,
        h.shape[2],
        h.shape[3],
        h.stride(0),
        0 if x is None else x.stride(0),
        0 if total is None else total.stride(0),
        *((0, 0, 0) if out is None else out.stride()[:3]),
        HAS_BIAS=bias is not None,
        HAS_X=x is not None,
        HAS_TOTAL=total is not None,
        HAS_OUT=out is not None,
        IS_DENSE=out is None or _is_dense(out),
        BLOCK=block,
        WIDTH=width,
        num_warps=WARPS,
    )


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

    inverse_scale: factor of the values in out, for E4M3.
    Raises ValueError for activations whose shapes do not match, and for pixels that are not contiguous.
    """
    batch, frames, height, width, channels = total.shape
    _check("total", total, total)
    _check_rows("out", out, total)
    _check("folded", folded, folded)
    _check("x", x, x)
    expected = (batch, frames, height // 2 + 1, width // 2 + 1, 4 * channels)
    if folded.shape != expected:
        raise ValueError(f"folded is {list(folded.shape)}; expected {list(expected)}")
    surplus = offsets[0] * offsets[1] * offsets[2]
    if x.shape != (batch, x.shape[1], height // 2, width // 2, channels * surplus) or frames > times * x.shape[1]:
        raise ValueError(
            f"x is {list(x.shape)} with offsets {offsets} and {times} times the frames; expected shapes that give"
            f" {list(total.shape)}"
        )
    rows = frames * height * width
    block_width = triton.next_power_of_2(channels)
    block = max(1, VALUES // block_width)
    _upsample_add_norm_silu[(triton.cdiv(rows, block), batch)](
        folded,
        bias,
        x,
        total,
        gamma,
        out,
        inverse_scale,
        rows,
        height,
        width,
        channels,
        times * x.shape[1] - frames,
        folded.stride(0),
        x.stride(0),
        total.stride(0),
        *out.stride()[:3],
        TIMES=times,
        OFFSET_T=offsets[0],
        OFFSET_Y=offsets[1],
        OFFSET_X=offsets[2],
        BLOCK=block,
        WIDTH=block_width,
        num_warps=WARPS,
    )


def quantize(x: Tensor, out: Tensor) -> Tensor:
    """Write x [B, T, H, W, C] in E4M3 to out, and return the scale, float32 []; the largest magnitude becomes 448.

    The host does not wait. Bytes moved: 2 E + 1 for each number, where E is the size of an input number.
    Raises ValueError for activations of different shapes, and for pixels that are not contiguous.
    """
    batch, rows, channels = _check("x", x, x)
    _check_rows("out", out, x)
    low, high = x.aminmax()
    amax = torch.maximum(-low, high).float()
    scale = torch.where(amax == 0, 1.0, amax / E4M3_MAX)
    width = triton.next_power_of_2(channels)
    block = max(1, VALUES // width)
    _quantize[(triton.cdiv(rows, block), batch)](
        x,
        out,
        scale,
        rows,
        channels,
        x.shape[2],
        x.shape[3],
        x.stride(0),
        *out.stride()[:3],
        BLOCK=block,
        WIDTH=width,
        num_warps=WARPS,
    )
    return scale


def _check(name: str, activations: Tensor, like: Tensor) -> tuple[int, int, int]:
    """Return the numbers of samples, of pixels per sample and of channels. Raises ValueError for other layouts."""
    batch, frames, height, width, channels = activations.shape
    strides = (height * width * channels, width * channels, channels, 1)
    if activations.shape != like.shape:
        raise ValueError(f"{name} is {list(activations.shape)}; expected {list(like.shape)}")
    dense = zip(activations.shape[1:], activations.stride()[1:], strides, strict=True)
    if any(size > 1 and stride != expected for size, stride, expected in dense):
        raise ValueError(
            f"{name} has strides {list(activations.stride())}; expected contiguous pixels; call .contiguous()"
        )
    return batch, frames * height * width, channels


def _is_dense(activations: Tensor) -> bool:
    """Return whether the pixels of a sample are contiguous."""
    _, frames, height, width, channels = activations.shape
    strides = (height * width * channels, width * channels)
    return all(
        size == 1 or stride == expected
        for size, stride, expected in zip((frames, height), activations.stride()[1:3], strides, strict=True)
    )


def _check_rows(name: str, activations: Tensor, like: Tensor) -> None:
    """Raise ValueError unless the shape matches and the pixels of a row are next to each other."""
    if activations.shape != like.shape:
        raise ValueError(f"{name} is {list(activations.shape)}; expected {list(like.shape)}")
    width, channels = activations.shape[3:]
    if activations.stride(4) != 1 or (width > 1 and activations.stride(3) != channels):
        raise ValueError(f"{name} has strides {list(activations.stride())}; expected the pixels of a row in order")


@triton.jit
def _store(places, x, inside) -> None:
    """Store float32, rounded to the dtype of the destination."""
    tl.store(places, round_to(x, places.dtype.element_ty), mask=inside)


@triton.jit
def norm_silu(summed, gamma_pointer, channel, channels):
    """Return SiLU of the RMS norm over the last dimension."""
    gamma = tl.load(gamma_pointer + channel, mask=channel < channels, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(summed * summed, axis=1))
    scale = tl.sqrt(channels.to(tl.float32)) / tl.maximum(length, _SMALLEST_LENGTH)
    normed = summed * scale[:, None] * gamma[None, :]
    return normed / (1.0 + tl.exp(-normed))


@triton.jit
def _add_norm_silu(
    h_pointer,
    bias_pointer,
    x_pointer,
    total_pointer,
    gamma_pointer,
    out_pointer,
    inverse_scale,
    rows,
    channels,
    height,
    width,
    h_stride,
    x_stride,
    total_stride,
    out_stride,
    out_frame_stride,
    out_line_stride,
    HAS_BIAS: tl.constexpr,
    HAS_X: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    HAS_OUT: tl.constexpr,
    IS_DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    sample = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, WIDTH)
    place = row[:, None] * channels + channel[None, :]
    is_channel = channel < channels
    inside = (row < rows)[:, None] & is_channel[None, :]
    summed = tl.load(h_pointer + sample * h_stride + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        summed += tl.load(bias_pointer + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    if HAS_X:
        summed += tl.load(x_pointer + sample * x_stride + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_TOTAL:
        _store(total_pointer + sample * total_stride + place, summed, inside)
    if HAS_OUT:
        normed = norm_silu(summed, gamma_pointer, channel, channels) * inverse_scale
        if not IS_DENSE:
            number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # in 32 bits, which are divided faster
            line = number // width % height * out_line_stride + number % width * channels
            first = (number // (width * height)).to(tl.int64) * out_frame_stride
            place = (first + line)[:, None] + channel[None, :]
        _store(out_pointer + sample * out_stride + place, normed, inside)


@triton.jit
def _quantize(
    x_pointer,
    out_pointer,
    scale_pointer,
    rows,
    channels,
    height,
    width,
    x_stride,
    out_stride,
    out_frame_stride,
    out_line_stride,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    sample = tl.program_id(1).to(tl.int64)
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, WIDTH)
    inside = (number < rows)[:, None] & (channel < channels)[None, :]
    place = number.to(tl.int64)[:, None] * channels + channel[None, :]
    x = tl.load(x_pointer + sample * x_stride + place, mask=inside, other=0.0).to(tl.float32)
    line = number // width % height * out_line_stride + number % width * channels
    first = (number // (width * height)).to(tl.int64) * out_frame_stride
    place = (first + line)[:, None] + channel[None, :]
    _store(out_pointer + sample * out_stride + place, x / tl.load(scale_pointer), inside)


@triton.jit
def _upsample_add_norm_silu(
    folded_pointer,
    bias_pointer,
    x_pointer,
    total_pointer,
    gamma_pointer,
    out_pointer,
    inverse_scale,
    rows,
    height,
    width,
    channels,
    skipped,
    folded_stride,
    x_stride,
    total_stride,
    out_stride,
    out_frame_stride,
    out_line_stride,
    TIMES: tl.constexpr,
    OFFSET_T: tl.constexpr,
    OFFSET_Y: tl.constexpr,
    OFFSET_X: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    sample = tl.program_id(1).to(tl.int64)
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # in 32 bits, which are divided faster
    row = number.to(tl.int64)
    channel = tl.arange(0, WIDTH)
    is_channel = channel < channels
    inside = (row < rows)[:, None] & is_channel[None, :]
    column, line = number % width, number // width % height
    frame = number // (width * height)
    x_phase, y_phase = column % 2, line % 2
    low_column, low_line, low_width, low_height = column // 2, line // 2, width // 2, height // 2
    place = ((frame * (low_height + 1) + low_line + y_phase) * (low_width + 1) + low_column + x_phase).to(tl.int64)
    place = (place * 4 + 2 * y_phase + x_phase) * channels
    summed = tl.load(
        folded_pointer + sample * folded_stride + place[:, None] + channel[None, :], mask=inside, other=0.0
    ).to(tl.float32)
    summed += tl.load(bias_pointer + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    repeated = frame + skipped
    group = repeated % TIMES % OFFSET_T
    group = group * OFFSET_Y + y_phase % OFFSET_Y
    group = group * OFFSET_X + x_phase % OFFSET_X
    groups = OFFSET_T * OFFSET_Y * OFFSET_X
    place = (repeated // TIMES * low_height + low_line) * low_width + low_column
    place = place.to(tl.int64) * (channels * groups) + group
    summed += tl.load(
        x_pointer + sample * x_stride + place[:, None] + (channel * groups)[None, :], mask=inside, other=0.0
    ).to(tl.float32)
    place = row[:, None] * channels + channel[None, :]
    _store(total_pointer + sample * total_stride + place, summed, inside)
    normed = norm_silu(summed, gamma_pointer, channel, channels) * inverse_scale
    place = frame.to(tl.int64) * out_frame_stride + line * out_line_stride + column * channels
    _store(out_pointer + sample * out_stride + place[:, None] + channel[None, :], normed, inside)
