"""Convolutions of the video decoder in FP8: an implicit matrix product in Triton; `reference.convolve` defines it.

The zeros around a frame are in memory. So pixels that follow each other in memory still do when they are displaced by a
tap: a tile of the input is a block of rows of a matrix [pixels, C], which the copy engine loads and the tensor cores
read from shared memory. The products at the right edge that belong to no pixel of the result are not stored.
"""

# a kernel is launched with options and plain constants, which its function does not declare
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from longvideo.kernels.nvfp4.triton.arithmetic import round_to

if TYPE_CHECKING:
    from torch import Tensor

    from longvideo.kernels.vae.format import FP8Kernel


@dataclass(frozen=True)
class Tile:
    """The work of a program, and how it is compiled.

    pixels: pixels of a frame. depth: input channels that are loaded together. channels: output channels. warps, stages:
    number of warps, and of loads in flight.
    """

    pixels: int
    depth: int
    channels: int
    warps: int
    stages: int


WIDE = Tile(pixels=128, depth=128, channels=256, warps=8, stages=3)
NARROW = Tile(pixels=256, depth=128, channels=128, warps=8, stages=3)
"""Tiles for more than 128 output channels, and for fewer."""


def convolve(inputs: Tensor, frames: int, kernel: FP8Kernel, out: Tensor, *, tile: Tile | None = None) -> None:
    """Convolve values in E4M3 and write the scaled sums to out, as `reference.convolve` does.

    inputs and out must be contiguous. tile: by default the fastest one on an H200. Sums are taken with the tensor
    cores' accumulation, which keeps fewer bits than float32.
    Raises ValueError for shapes and dtypes that do not match, and for memory that is not contiguous.
    """
    batch, kept, height, width, channels = inputs.shape
    times, rows, columns = kernel.size
    expected = (batch, frames, height - rows + 1, width - columns + 1, len(kernel.values))
    if channels != kernel.channels or kept < frames + times - 1 or out.shape != expected:
        raise ValueError(
            f"inputs are {list(inputs.shape)} and out is {list(out.shape)}; expected {kernel.channels} channels, at"
            f" least {frames + times - 1} frames, and out {list(expected)}"
        )
    if inputs.dtype != torch.float8_e4m3fn or not (inputs.is_contiguous() and out.is_contiguous()):
        raise ValueError("inputs and out must be contiguous, and inputs float8_e4m3fn")
    _, _, out_height, out_width, out_channels = expected
    if tile is None:
        tile = WIDE if out_channels > NARROW.channels else NARROW
    pixels = TensorDescriptor.from_tensor(inputs.view(-1, channels), [tile.pixels, tile.depth])
    weights = TensorDescriptor.from_tensor(kernel.values, [tile.channels, tile.depth])
    num_channels = triton.cdiv(out_channels, tile.channels)
    num_tiles = triton.cdiv(out_height * width, tile.pixels)
    _convolve[(num_channels * num_tiles * frames, batch)](
        pixels,
        weights,
        kernel.scales,
        out,
        kept,
        frames,
        height,
        width,
        out_height,
        out_width,
        out_channels,
        num_channels,
        num_tiles,
        TAPS=times * rows * columns,
        ROWS=rows,
        COLUMNS=columns,
        DEPTH_STEPS=kernel.values.shape[1] // (times * rows * columns * tile.depth),
        PIXELS=tile.pixels,
        DEPTH=tile.depth,
        CHANNELS=tile.channels,
        STAGES=tile.stages,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@triton.jit
def _convolve(
    pixels,
    weights,
    scale_pointer,
    out_pointer,
    kept,
    frames,
    height,
    width,
    out_height,
    out_width,
    channels,
    num_channels,
    num_tiles,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH_STEPS: tl.constexpr,
    PIXELS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    # programs that read the same pixels are next to each other
    program, sample = tl.program_id(0), tl.program_id(1)
    first_channel = program % num_channels * CHANNELS
    program = program // num_channels
    first_pixel = program % num_tiles * PIXELS
    frame = program // num_tiles
    first_input = (sample * kept + frame) * height * width + first_pixel
    summed = tl.zeros((PIXELS, CHANNELS), dtype=tl.float32)
    for step in tl.range(TAPS * DEPTH_STEPS, num_stages=STAGES):
        tap = step // DEPTH_STEPS
        row = tap // (ROWS * COLUMNS) * height + tap // COLUMNS % ROWS
        loaded = pixels.load([first_input + row * width + tap % COLUMNS, step % DEPTH_STEPS * DEPTH])
        factors = weights.load([first_channel, step * DEPTH])
        summed = tl.dot(loaded, factors.T, summed)
    channel = first_channel + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    summed *= tl.load(scale_pointer + channel, mask=is_channel, other=0.0)[None, :]
    pixel = first_pixel + tl.arange(0, PIXELS)
    row, column = pixel // width, pixel % width
    inside = ((row < out_height) & (column < out_width))[:, None] & is_channel[None, :]
    image = sample.to(tl.int64) * frames + frame
    place = ((image * out_height + row) * out_width + column)[:, None] * channels + channel[None, :]
    tl.store(out_pointer + place, round_to(summed, out_pointer.dtype.element_ty), mask=inside)
