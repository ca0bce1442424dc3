"""Quantization of matrices to E4M3 or E5M2 with one scale, also transposed, as `kernels.fp8.reference` defines it.

A program reads a tile once and writes it as rows, as columns, or both, so that the
operands of the two backward products need no pass of their own. Kernels are launched without FMA contraction.
"""

# a kernel is launched with options and plain constants, which its function does not declare
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from longvideo.kernels.fp8.format import SIZE_MULTIPLE, FP8Tensor
from longvideo.kernels.fp8.reference import tensor_scale
from longvideo.kernels.fp8.triton.rows import e4m3_bytes
from longvideo.kernels.nvfp4.triton.arithmetic import magnitude_bits

BLOCK_ROWS, BLOCK_COLUMNS = 64, 128
_E5M2_MAX = tl.constexpr(57344.0)
_E5M2_TINY = tl.constexpr(2.0**-14)  # the smallest normal number
_EXPONENT_BITS = tl.constexpr(0x7F800000)
_ANCHOR = tl.constexpr(1.5 * 2.0**21)  # times a power of two, its last bit is worth a quarter of that power
_SOFTWARE_ROUNDING = tl.constexpr(knobs.runtime.interpret)


def largest_magnitude(x: Tensor) -> Tensor:
    """Return max |x| as a float32 scalar in one pass; NaN if x holds NaN."""
    return torch.linalg.vector_norm(x, float("inf")).float()


def quantize_tensor(x_RC: Tensor, amax: Tensor, dtype: torch.dtype) -> FP8Tensor:
    """Quantize a contiguous matrix, as the reference does. Bytes moved: E + 1 for each number of E bytes."""
    rows, _, scale = _quantize(x_RC, amax, dtype, rows=True, columns=False)
    return FP8Tensor(rows, scale)


def quantize_transposed(x_RC: Tensor, amax: Tensor, dtype: torch.dtype) -> FP8Tensor:
    """Quantize the transpose, [C, R] with R padded, as the reference does. Bytes moved: E + 1 for each number."""
    _, columns, scale = _quantize(x_RC, amax, dtype, rows=False, columns=True)
    return FP8Tensor(columns, scale)


def quantize_both(x_RC: Tensor, amax: Tensor, dtype: torch.dtype) -> tuple[FP8Tensor, FP8Tensor]:
    """Return the results of the two functions above, in one pass. Bytes moved: E + 2 for each number."""
    rows, columns, scale = _quantize(x_RC, amax, dtype, rows=True, columns=True)
    return FP8Tensor(rows, scale), FP8Tensor(columns, scale)


def _quantize(
    x_RC: Tensor, amax: Tensor, dtype: torch.dtype, *, rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return values by rows and by columns, each empty if its flag is off, and the scale."""
    if x_RC.ndim != 2 or not x_RC.numel() or not x_RC.is_contiguous():
        raise ValueError(f"cannot quantize {list(x_RC.shape)}; expected a contiguous matrix that is not empty")
    height, width = x_RC.shape
    padded = triton.cdiv(height, SIZE_MULTIPLE) * SIZE_MULTIPLE
    as_rows = torch.empty((height, width) if rows else 0, dtype=torch.uint8, device=x_RC.device)
    as_columns = torch.empty((width, padded) if columns else 0, dtype=torch.uint8, device=x_RC.device)
    scale = tensor_scale(amax, dtype)
    _tensor_kernel[(triton.cdiv(padded, BLOCK_ROWS), triton.cdiv(width, BLOCK_COLUMNS))](
        x_RC,
        scale,
        as_rows,
        as_columns,
        height,
        width,
        padded,
        E5M2=dtype is torch.float8_e5m2,
        ROWS=rows,
        COLUMNS=columns,
        BLOCK_R=BLOCK_ROWS,
        BLOCK_C=BLOCK_COLUMNS,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return as_rows.view(dtype), as_columns.view(dtype), scale


@triton.jit
def _tensor_kernel(
    x_pointer,
    scale_pointer,
    rows_pointer,
    columns_pointer,
    height,
    width,
    padded,
    E5M2: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    place = row[:, None] * width + column[None, :]
    inside = (row[:, None] < height) & (column[None, :] < width)
    x = tl.load(x_pointer + place, mask=inside, other=0.0).to(tl.float32)
    scaled = x * tl.div_rn(1.0, tl.load(scale_pointer))
    values = _e5m2_bytes(scaled) if E5M2 else e4m3_bytes(scaled)
    if ROWS:
        tl.store(rows_pointer + place, values, mask=inside)
    if COLUMNS:
        transposed = tl.trans(values)
        target = column[:, None] * padded + row[None, :]
        tl.store(columns_pointer + target, transposed, mask=(column[:, None] < width) & (row[None, :] < padded))


@triton.jit
def _e5m2_bytes(x):
    """Round float32 to E5M2, to nearest, ties to even, saturating; return the bytes."""
    if _SOFTWARE_ROUNDING:
        magnitude = tl.minimum(tl.abs(x), _E5M2_MAX, propagate_nan=tl.PropagateNan.ALL)
        power = (magnitude_bits(magnitude) & _EXPONENT_BITS).to(tl.float32, bitcast=True)
        anchor = tl.maximum(power, _E5M2_TINY) * _ANCHOR
        rounded = (magnitude + anchor) - anchor
        # a number of E5M2 is the upper byte of the same number in float16
        byte = rounded.to(tl.float16).to(tl.uint16, bitcast=True) >> 8
        sign = (x.to(tl.uint32, bitcast=True) >> 24) & 0x80
        return (byte.to(tl.uint32) | sign).to(tl.uint8)
    return x.to(tl.float8e5).to(tl.uint8, bitcast=True)
