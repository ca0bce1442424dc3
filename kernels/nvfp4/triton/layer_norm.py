"""Quantization of the result of a modulated LayerNorm."""

# a kernel is launched with options and plain constants, which its function does not declare
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longvideo.kernels.nvfp4.format import GROUP, ExactOperand, NVFP4Tensor, Rule
from longvideo.kernels.nvfp4.triton.arithmetic import (
    GROUP_SIZE,
    GROUP_WORDS,
    load_groups,
    magnitude_bits,
    quantize_groups,
    round_to,
    store_codes,
    store_exact,
)
from longvideo.kernels.nvfp4.triton.quantizing import amax_and_scales, block_warps, check_input, empty_outputs

BLOCK_ROWS = 4
"""Rows per program, which share the modulation of their frame."""


def layer_norm_modulate_quantize(
    h_BLD: Tensor,
    shift_BTSD: Tensor,
    scale_BTSD: Tensor,
    rule: Rule = Rule.ADAPTIVE,
    *,
    eps: float,
    block_rows: int = BLOCK_ROWS,
) -> NVFP4Tensor:
    """Quantize `LayerNorm(h) * (1 + scale) + shift`, computed in float32 and rounded to the dtype of h first.

    h: contiguous [B, L, D]. shift, scale: float32 [B or 1, T, S or 1, D] for T latent frames of S = L/T tokens, with
    contiguous D. The result is computed twice, the first time for the largest magnitude and for the mean and deviation
    of each row; storing it in between would move 2 E more bytes. Bytes moved: 2 E + 9/16, and 16/D for the statistics.
    Raises ValueError for shapes that do not fit and for h that is not contiguous.
    """
    codes, scales, tensor_scale = _layer_norm_quantize(
        h_BLD, shift_BTSD, scale_BTSD, rule, eps, block_rows, exact_dtype=None
    )
    return NVFP4Tensor(codes, scales, tensor_scale)


def layer_norm_modulate_quantize_exact(
    h_BLD: Tensor,
    shift_BTSD: Tensor,
    scale_BTSD: Tensor,
    rule: Rule = Rule.ADAPTIVE,
    *,
    eps: float,
    dtype: torch.dtype = torch.bfloat16,
    block_rows: int = BLOCK_ROWS,
) -> ExactOperand:
    """Return `exact(layer_norm_modulate_quantize(...))`, computed without packing. Bytes moved: 2 E + 2, and 16/D."""
    values, _, tensor_scale = _layer_norm_quantize(
        h_BLD, shift_BTSD, scale_BTSD, rule, eps, block_rows, exact_dtype=dtype
    )
    return ExactOperand(values, tensor_scale)


def _layer_norm_quantize(
    h_BLD: Tensor,
    shift_BTSD: Tensor,
    scale_BTSD: Tensor,
    rule: Rule,
    eps: float,
    block_rows: int,
    *,
    exact_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_input(h_BLD)
    if h_BLD.dim() != 3:
        raise ValueError(f"h is {list(h_BLD.shape)}; expected [B, L, D]")
    batch, length, dim = h_BLD.shape
    frames = shift_BTSD.shape[1]
    if length % frames:
        raise ValueError(
            f"h has {length} tokens; expected a multiple of {frames}, the number of frames of shift and scale"
        )
    tokens = length // frames
    shifts, scales_ = (m.expand(batch, frames, tokens, dim) for m in (shift_BTSD, scale_BTSD))
    for m in (shifts, scales_):
        if m.dtype != torch.float32 or m.stride(-1) != 1:
            raise ValueError(
                f"shift and scale are {m.dtype} with a last stride of {m.stride(-1)}; expected float32 and 1"
            )
    # a modulation that all tokens of a frame share is loaded once for all rows of a program
    per_token = bool(shifts.stride(2) or scales_.stride(2)) and tokens > 1
    grid = (batch * frames, triton.cdiv(tokens, block_rows))
    statistics = torch.empty(batch * length, 2, dtype=torch.float32, device=h_BLD.device)
    maxima = torch.empty(1, grid[0] * grid[1], dtype=torch.int32, device=h_BLD.device)
    inputs = (h_BLD, shifts, scales_, statistics)
    layout = (frames, tokens, *shifts.stride()[:3], *scales_.stride()[:3])
    block_groups = triton.next_power_of_2(dim // GROUP)
    constants = {
        "DIM": dim,
        "PER_TOKEN": per_token,
        "ROWS": block_rows,
        "BLOCK": block_groups,
        "num_warps": block_warps(block_groups),
        "enable_fp_fusion": False,
    }
    _layer_norm_maxima_kernel[grid](*inputs, maxima, *layout, eps, **constants)
    amax, tensor_scale = (row.squeeze(0) for row in amax_and_scales(maxima, rule))
    codes, scales = empty_outputs(h_BLD, exact_dtype)
    _layer_norm_quantize_kernel[grid](
        *inputs,
        amax,
        codes if exact_dtype else codes.view(torch.int32),
        None if exact_dtype else scales,
        *layout,
        RULE=rule.value,
        ADAPTIVE=rule.is_adaptive,
        EXACT=exact_dtype is not None,
        **constants,
    )
    return codes, scales.view(torch.float8_e4m3fn), tensor_scale


@triton.jit
def _modulated(x, mean, deviation_reciprocal, shift, scale, dtype: tl.constexpr):
    normed = (x - mean) * deviation_reciprocal
    return round_to(normed * (1.0 + scale) + shift, dtype).to(tl.float32)


@triton.jit
def _layer_norm_maxima_kernel(
    h_ptr,
    shift_ptr,
    scale_ptr,
    statistics_ptr,
    maxima_ptr,
    frames,
    tokens,
    shift_stride_b,
    shift_stride_t,
    shift_stride_s,
    scale_stride_b,
    scale_stride_t,
    scale_stride_s,
    eps,
    DIM: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    frame, block = tl.program_id(0), tl.program_id(1)
    group = tl.arange(0, BLOCK)
    inside = group < DIM // GROUP_SIZE
    shift_ptr += (frame // frames) * shift_stride_b + (frame % frames) * shift_stride_t
    scale_ptr += (frame // frames) * scale_stride_b + (frame % frames) * scale_stride_t
    if not PER_TOKEN:
        shift = load_groups(shift_ptr, group, inside)
        scale = load_groups(scale_ptr, group, inside)
    largest = tl.zeros([BLOCK, GROUP_SIZE], dtype=tl.int32)
    for index in range(ROWS):
        token = block * ROWS + index
        if token < tokens:
            row = (frame * tokens + token).to(tl.int64)
            x = load_groups(h_ptr + row * DIM, group, inside)
            mean = tl.sum(tl.sum(x, axis=1), axis=0) / DIM
            centered = tl.where(inside[:, None], x - mean, 0.0)
            variance = tl.sum(tl.sum(centered * centered, axis=1), axis=0) / DIM
            reciprocal = tl.rsqrt(variance + eps)
            tl.store(statistics_ptr + row * 2, mean)
            tl.store(statistics_ptr + row * 2 + 1, reciprocal)
            if PER_TOKEN:
                shift = load_groups(shift_ptr + token * shift_stride_s, group, inside)
                scale = load_groups(scale_ptr + token * scale_stride_s, group, inside)
            modulated = _modulated(x, mean, reciprocal, shift, scale, h_ptr.dtype.element_ty)
            largest = tl.maximum(largest, tl.where(inside[:, None], magnitude_bits(modulated), 0))
    program = frame * tl.num_programs(1) + block
    tl.store(maxima_ptr + program, tl.max(tl.max(largest, axis=1), axis=0))


@triton.jit
def _layer_norm_quantize_kernel(
    h_ptr,
    shift_ptr,
    scale_ptr,
    statistics_ptr,
    amax_ptr,
    codes_ptr,
    scales_ptr,
    frames,
    tokens,
    shift_stride_b,
    shift_stride_t,
    shift_stride_s,
    scale_stride_b,
    scale_stride_t,
    scale_stride_s,
    RULE: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    EXACT: tl.constexpr,
    DIM: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    frame, block = tl.program_id(0), tl.program_id(1)
    group = tl.arange(0, BLOCK)
    inside = group < DIM // GROUP_SIZE
    shift_ptr += (frame // frames) * shift_stride_b + (frame % frames) * shift_stride_t
    scale_ptr += (frame // frames) * scale_stride_b + (frame % frames) * scale_stride_t
    amax = tl.load(amax_ptr)
    if not PER_TOKEN:
        shift = load_groups(shift_ptr, group, inside)
        scale = load_groups(scale_ptr, group, inside)
    for index in range(ROWS):
        token = block * ROWS + index
        if token < tokens:
            row = (frame * tokens + token).to(tl.int64)
            x = load_groups(h_ptr + row * DIM, group, inside)
            mean = tl.load(statistics_ptr + row * 2)
            reciprocal = tl.load(statistics_ptr + row * 2 + 1)
            if PER_TOKEN:
                shift = load_groups(shift_ptr + token * shift_stride_s, group, inside)
                scale = load_groups(scale_ptr + token * scale_stride_s, group, inside)
            modulated = _modulated(x, mean, reciprocal, shift, scale, h_ptr.dtype.element_ty)
            value, byte, group_scale = quantize_groups(modulated, amax, 0.0, RULE, ADAPTIVE, False)
            if EXACT:
                store_exact(codes_ptr + row * DIM, modulated, value, group_scale, group, inside)
            else:
                row_scales_ptr = scales_ptr + row * (DIM // GROUP_SIZE)
                store_codes(
                    codes_ptr + row * (DIM // GROUP_SIZE * GROUP_WORDS),
                    row_scales_ptr,
                    modulated,
                    value,
                    byte,
                    group,
                    inside,
                )
