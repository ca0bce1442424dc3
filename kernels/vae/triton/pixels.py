"""Triton kernel from the output of the video decoder to pixels; `reference` defines it."""

# a kernel is launched with options and plain constants, which its function does not declare
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

PIXEL_BLOCK = 1024
"""Number of values in a program."""


def to_pixels(packed: Tensor, bias: Tensor | None, patch: int, out: Tensor) -> None:
    """Write packed + bias, [B, T, H, W, 3 patch^2] in [-1, 1], as pixels, uint8 [B, T, patch H, patch W, 3].

    Raises ValueError for shapes that do not match, and for memory that is not contiguous.
    """
    batch, frames, height, width, channels = packed.shape
    expected = (batch, frames, patch * height, patch * width, 3)
    if channels != 3 * patch**2 or out.shape != expected or not (packed.is_contiguous() and out.is_contiguous()):
        raise ValueError(
            f"packed is {list(packed.shape)} and out is {list(out.shape)}; expected contiguous packed"
            f" [B, T, H, W, {3 * patch**2}] and contiguous out [B, T, {patch} H, {patch} W, 3]"
        )
    _to_pixels[(triton.cdiv(out.numel(), PIXEL_BLOCK),)](
        packed,
        packed if bias is None else bias,
        out,
        out.numel(),
        height,
        width,
        HAS_BIAS=bias is not None,
        PATCH=patch,
        BLOCK=PIXEL_BLOCK,
    )


@triton.jit
def _to_pixels(
    packed_pointer,
    bias_pointer,
    out_pointer,
    count,
    height,
    width,
    HAS_BIAS: tl.constexpr,
    PATCH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    color = index % 3
    column = index // 3 % (width * PATCH)
    line = index // (3 * width * PATCH) % (height * PATCH)
    frame = index // (3 * width * PATCH * height * PATCH)
    channel = (color * PATCH + column % PATCH) * PATCH + line % PATCH
    place = ((frame * height + line // PATCH) * width + column // PATCH) * (3 * PATCH * PATCH) + channel
    value = tl.load(packed_pointer + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias_pointer + channel, mask=inside, other=0.0).to(tl.float32)
    value = (value + 1.0) * 127.5
    # to nearest, halves to even, as torch rounds; not every version of Triton has an operation for it
    lower = tl.floor(value)
    above = value - lower
    is_odd = lower - 2.0 * tl.floor(lower * 0.5)
    rounded = lower + tl.where((above > 0.5) | ((above == 0.5) & (is_odd > 0.5)), 1.0, 0.0)
    rounded = tl.minimum(tl.maximum(rounded, 0.0), 255.0)
    tl.store(out_pointer + index, rounded.to(tl.uint8), mask=inside)
