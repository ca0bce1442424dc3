"""Quantization for training: 16 x 16 tiles of a weight, and groups across the rows of a matrix, transformed."""

# a kernel is launched with options and plain constants, which its function does not declare
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longvideo.kernels.nvfp4.format import GROUP, ExactOperand, NVFP4Tensor, Rule, check_groups
from longvideo.kernels.nvfp4.triton.arithmetic import (
    GROUP_SIZE,
    load_columns,
    load_groups,
    magnitude_bits,
    quantize_groups,
    random_hadamard,
    store_codes,
    store_exact,
    uniform,
)
from longvideo.kernels.nvfp4.triton.quantizing import (
    amax_and_scales,
    block_warps,
    check_contiguous,
    check_input,
    largest_magnitudes,
    seed_on,
)

BLOCK_COLUMNS = 64  # columns of a program that forms groups of rows
BLOCK_TILES = 8  # tiles of 16 x 16 in a program


def quantize_tiles_exact(
    x_RK: Tensor, rule: Rule, *, dtype: torch.dtype = torch.bfloat16, block_tiles: int = BLOCK_TILES
) -> ExactOperand:
    """Quantize a contiguous matrix in 16 x 16 tiles and return `code x group scale`, as the reference does.

    Bytes moved: 2 E + 2. Raises ValueError for a matrix without whole tiles, or that is not contiguous.
    """
    check_input(x_RK)
    check_groups(x_RK.shape, tile_rows=GROUP)
    rows, columns = x_RK.shape
    amax, tensor_scale = (row.squeeze(0) for row in amax_and_scales(largest_magnitudes(x_RK), rule))
    values = torch.empty(x_RK.shape, dtype=dtype, device=x_RK.device)
    _tiles_kernel[(rows // GROUP, triton.cdiv(columns // GROUP, block_tiles))](
        x_RK,
        amax,
        values,
        columns // GROUP,
        RULE=rule.value,
        ADAPTIVE=rule.is_adaptive,
        TILES=block_tiles,
        num_warps=block_warps(block_tiles * GROUP),
        enable_fp_fusion=False,
    )
    return ExactOperand(values, tensor_scale)


def quantize_across(
    x_MC: Tensor, rule: Rule = Rule.ADAPTIVE, *, hadamard: bool = False, block_columns: int = BLOCK_COLUMNS
) -> NVFP4Tensor:
    """Quantize the transpose of a contiguous matrix, [C, M], with M padded with zeros, as the reference does.

    The transform is computed twice, the first time for the largest magnitude. Bytes moved: 2 E + 9/16. Raises
    ValueError for a matrix that is empty or not contiguous.
    """
    codes, scales, tensor_scale = _quantize_across(x_MC, rule, hadamard, None, block_columns, exact_dtype=None)
    return NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), tensor_scale)


def quantize_across_exact(
    x_MC: Tensor,
    rule: Rule = Rule.ADAPTIVE,
    *,
    hadamard: bool = False,
    seed: int | Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    block_columns: int = BLOCK_COLUMNS,
) -> ExactOperand:
    """Return `exact(quantize_across(...))`, computed without packing. seed: as in `quantize`. Bytes moved: 2 E + 2."""
    values, _, tensor_scale = _quantize_across(x_MC, rule, hadamard, seed, block_columns, exact_dtype=dtype)
    return ExactOperand(values, tensor_scale)


def _quantize_across(
    x_MC: Tensor,
    rule: Rule,
    hadamard: bool,
    seed: int | Tensor | None,
    block_columns: int,
    *,
    exact_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if x_MC.ndim != 2 or not x_MC.numel():
        raise ValueError(f"cannot quantize {list(x_MC.shape)} across its rows; expected a matrix that is not empty")
    check_contiguous(x_MC, "the matrix to quantize")
    rows, columns = x_MC.shape
    groups = triton.cdiv(rows, GROUP)
    grid = (triton.cdiv(columns, block_columns), groups)
    options = {"HADAMARD": hadamard, "BLOCK": block_columns, "enable_fp_fusion": False}
    maxima = torch.empty(1, grid[0] * grid[1], dtype=torch.int32, device=x_MC.device)
    _maxima_across_kernel[grid](x_MC, maxima, rows, columns, num_warps=_column_warps(block_columns), **options)
    amax, tensor_scale = (row.squeeze(0) for row in amax_and_scales(maxima, rule))
    shape = (columns, groups * GROUP if exact_dtype else groups * GROUP // 2)
    codes = torch.empty(shape, dtype=exact_dtype or torch.uint8, device=x_MC.device)
    scales = torch.empty(columns, groups, dtype=torch.uint8, device=x_MC.device)
    _across_kernel[grid](
        x_MC,
        amax,
        seed_on(x_MC.device, seed, rule),
        codes if exact_dtype else codes.view(torch.int32),
        None if exact_dtype else scales,
        rows,
        columns,
        groups,
        RULE=rule.value,
        ADAPTIVE=rule.is_adaptive,
        STOCHASTIC=seed is not None,
        EXACT=exact_dtype is not None,
        num_warps=_column_warps(block_columns),
        **options,
    )
    return codes, scales, tensor_scale


def _column_warps(block_columns: int) -> int:
    """Return the number of warps with which a thread has two columns, which it loads at once."""
    return max(block_columns // 64, 1)


@triton.jit
def _tiles_kernel(
    x_ptr,
    amax_ptr,
    values_ptr,
    row_groups,
    RULE: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    first = tl.program_id(0).to(tl.int64) * row_groups * (GROUP_SIZE * GROUP_SIZE)
    index = tl.arange(0, GROUP_SIZE * TILES)
    tile = tl.program_id(1) * TILES + index % TILES
    group = index // TILES * row_groups + tile
    inside = tile < row_groups
    x = load_groups(x_ptr + first, group, inside)
    value, _, scale = quantize_groups(x, tl.load(amax_ptr), 0.0, RULE, ADAPTIVE, False, TILES)
    store_exact(values_ptr + first, x, value, scale, group, inside)


@triton.jit
def _load_across(x_ptr, rows, columns, column, HADAMARD: tl.constexpr):
    row = tl.program_id(1) * GROUP_SIZE
    x_ptr += row.to(tl.int64) * columns
    x = load_columns(x_ptr, 0, rows - row, columns, column, column < columns)
    return random_hadamard(x, x_ptr.dtype.element_ty) if HADAMARD else x


@triton.jit
def _maxima_across_kernel(x_ptr, maxima_ptr, rows, columns, HADAMARD: tl.constexpr, BLOCK: tl.constexpr) -> None:
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = _load_across(x_ptr, rows, columns, column, HADAMARD)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(maxima_ptr + program, tl.max(tl.max(magnitude_bits(x), axis=1), axis=0))


@triton.jit
def _across_kernel(
    x_ptr,
    amax_ptr,
    seed_ptr,
    codes_ptr,
    scales_ptr,
    rows,
    columns,
    groups,
    RULE: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    EXACT: tl.constexpr,
    HADAMARD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = _load_across(x_ptr, rows, columns, column, HADAMARD)
    group = column.to(tl.int64) * groups + tl.program_id(1)
    draw = 0.0
    if STOCHASTIC:
        draw = uniform(tl.load(seed_ptr), group)
    value, byte, scale = quantize_groups(x, tl.load(amax_ptr), draw, RULE, ADAPTIVE, STOCHASTIC)
    if EXACT:
        store_exact(codes_ptr, x, value, scale, group, column < columns)
    else:
        store_codes(codes_ptr, scales_ptr, x, value, byte, group, column < columns)
