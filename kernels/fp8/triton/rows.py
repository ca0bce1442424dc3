"""Quantization of rows to E4M3, as `kernels.fp8.reference` defines it.

A program has a whole row in registers, so each number is read once and written once. Kernels compute in float32, divide
once per row by the rules of IEEE 754, and are launched without FMA contraction.
"""

# a kernel is launched with options and plain constants, which its function does not declare
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from longvideo.kernels.fp8.format import E4M3_MAX, SCALE_MIN, FP8Rows
from longvideo.kernels.nvfp4.triton.arithmetic import encode_scale, magnitude_bits, round_to

_E4M3_MAX = tl.constexpr(E4M3_MAX)
_SCALE_MIN = tl.constexpr(SCALE_MIN)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
# the interpreter's cast to E4M3 adds half a step without a carry into the exponent; a GPU has an instruction for it
_SOFTWARE_ROUNDING = tl.constexpr(knobs.runtime.interpret)


def quantize_rows(x: Tensor) -> FP8Rows:
    """Quantize each row of [..., K], as `reference.quantize_rows` does. The host does not wait.

    The numbers of a row must be contiguous, and all rows must have one stride. Bytes moved: E + 1 for each number,
    where E is the size of an input number, and 4 for each row.
    Raises ValueError for other layouts and dtypes, and for an empty tensor.
    """
    return _quantize(x, gelu=False)


def gelu_tanh_quantize_rows(h: Tensor) -> FP8Rows:
    """Quantize the rows of GELU (tanh formula), computed in float32 and rounded to h's dtype first.

    Layouts, bytes and errors are those of `quantize_rows`.
    """
    return _quantize(h, gelu=True)


def _quantize(x: Tensor, *, gelu: bool) -> FP8Rows:
    rows = _as_rows(x)
    columns = rows.shape[1]
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    _quantize_kernel[(rows.shape[0],)](
        rows,
        values.view(torch.uint8),
        scales,
        columns,
        rows.stride(0),
        GELU=gelu,
        BLOCK=block,
        num_warps=_warps(columns),
        enable_fp_fusion=False,
    )
    return FP8Rows(values, scales)


def _as_rows(x: Tensor) -> Tensor:
    """Return a view [R, K] of a tensor whose rows have one stride. Raises ValueError for other tensors."""
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"cannot quantize {x.dtype}; expected bfloat16, float16 or float32")
    if not x.numel():
        raise ValueError(f"cannot quantize an empty tensor {list(x.shape)}, which has no largest magnitude")
    if x.stride(-1) == 1:
        try:
            return x.view(-1, x.shape[-1])
        except RuntimeError:
            pass
    raise ValueError(
        f"{list(x.shape)} has strides {x.stride()}; expected contiguous rows with one stride; call .contiguous()"
    )


def _warps(columns: int) -> int:
    if columns <= 4096:
        return 4
    return 8 if columns <= 8192 else 16


@triton.jit
def _quantize_kernel(
    x_pointer, values_pointer, scales_pointer, columns, row_stride, GELU: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(x_pointer + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        # 1 + tanh(u) is 2 / (1 + exp(-2u)), without the cancellation
        u = _SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)
        x = round_to(x / (1.0 + tl.exp(-2.0 * u)), x_pointer.dtype.element_ty).to(tl.float32)
    # as integers, magnitudes have the order of the numbers, and NaN is above all of them
    amax = tl.max(magnitude_bits(x), axis=0).to(tl.float32, bitcast=True)
    scale = tl.div_rn(amax, _E4M3_MAX)
    scale = tl.where(scale < _SCALE_MIN, _SCALE_MIN, scale)
    scale = tl.where(amax == 0, 1.0, scale)
    values = e4m3_bytes(x * tl.div_rn(1.0, scale))
    tl.store(values_pointer + row * columns + column, values, mask=inside)
    tl.store(scales_pointer + row, scale)


@triton.jit
def e4m3_bytes(x):
    """Round float32 to E4M3, to nearest, ties to even, saturating; return the bytes."""
    if _SOFTWARE_ROUNDING:
        magnitude = tl.abs(x)
        byte, _ = encode_scale(tl.where(magnitude > _E4M3_MAX, _E4M3_MAX, magnitude), False)
        sign = (x.to(tl.uint32, bitcast=True) >> 24) & 0x80
        return (byte.to(tl.uint32) | sign).to(tl.uint8)
    else:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
