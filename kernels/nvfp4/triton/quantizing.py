"""Quantization of a tensor, or of its GELU."""

# a kernel is launched with options and plain constants, which its function does not declare
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longvideo.kernels.nvfp4.format import GROUP, ExactOperand, NVFP4Tensor, Rule, check_groups
from longvideo.kernels.nvfp4.rounding import tensor_scale_of
from longvideo.kernels.nvfp4.triton.arithmetic import (
    GROUP_SIZE,
    GROUP_WORDS,
    load_groups,
    magnitude_bits,
    quantize_groups,
    round_to,
    store_codes,
    store_exact,
    uniform,
)

BLOCK_GROUPS = 64  # groups per program
MAXIMA_BLOCKS = 16  # factor of the groups in a program that only computes their largest magnitude
MAXIMA_WARPS = 8
BLOCK_MAXIMA = 4096  # number of results of such programs that are reduced at once

_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)


def quantize(
    x: Tensor,
    rule: Rule = Rule.ADAPTIVE,
    *,
    amax: Tensor | None = None,
    seed: int | Tensor | None = None,
    block_groups: int = BLOCK_GROUPS,
) -> NVFP4Tensor:
    """Quantize a contiguous [..., K] tensor along its last dimension, as `reference.quantize` does.

    The host does not wait.
    amax: largest magnitude from which the tensor scale is computed, float32, broadcast against [..., K/16]; by default
        that of the whole tensor.
    seed: seed of stochastic rounding, an integer or an int64 scalar on the device: scales are rounded up, codes to one
        of the two nearest. Group i of the tensor uses blocks 4 i to 4 i + 3 of the Philox stream of the seed.
    NaN and infinity make the tensor scale, and so every value, NaN or infinite.
    Bytes moved: 2 E + 9/16, or E + 9/16 if amax is given.
    Raises ValueError for shapes without whole groups, for memory that is not contiguous, and for a seed with an
    adaptive rule, which would be biased by the choice after the rounding.
    """
    codes, scales, tensor_scale = _quantize(x, rule, amax, seed, block_groups, exact_dtype=None, gelu=False)
    return NVFP4Tensor(codes, scales, tensor_scale)


def quantize_exact(
    x: Tensor,
    rule: Rule = Rule.ADAPTIVE,
    *,
    seed: int | Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    block_groups: int = BLOCK_GROUPS,
) -> ExactOperand:
    """Return `exact(quantize(...))`, computed without packing; errors as there. Bytes moved: 2 E + 2."""
    values, _, tensor_scale = _quantize(x, rule, None, seed, block_groups, exact_dtype=dtype, gelu=False)
    return ExactOperand(values, tensor_scale)


def gelu_tanh_quantize(h: Tensor, rule: Rule = Rule.ADAPTIVE, *, block_groups: int = BLOCK_GROUPS) -> NVFP4Tensor:
    """Quantize GELU (tanh formula) of a contiguous [..., K] tensor, computed in float32 and rounded to its dtype first.

    GELU is computed twice, the first time for the largest magnitude; storing it in between would move 2 E more bytes.
    Bytes moved: 2 E + 9/16. Raises the errors of `quantize`.
    """
    return NVFP4Tensor(*_quantize(h, rule, None, None, block_groups, exact_dtype=None, gelu=True))


def gelu_tanh_quantize_exact(
    h: Tensor,
    rule: Rule = Rule.ADAPTIVE,
    *,
    dtype: torch.dtype = torch.bfloat16,
    block_groups: int = BLOCK_GROUPS,
) -> ExactOperand:
    """Return `exact(gelu_tanh_quantize(...))`, computed without packing. Bytes moved: 2 E + 2."""
    values, _, tensor_scale = _quantize(h, rule, None, None, block_groups, exact_dtype=dtype, gelu=True)
    return ExactOperand(values, tensor_scale)


def largest_magnitudes(x: Tensor, *, gelu: bool = False, block_groups: int = BLOCK_GROUPS) -> Tensor:
    """Return the bits of the largest magnitude that each of P programs computes, int32 [1, P]. x: contiguous."""
    num_groups, block = x.numel() // GROUP, block_groups * MAXIMA_BLOCKS
    maxima = torch.empty(1, triton.cdiv(num_groups, block), dtype=torch.int32, device=x.device)
    _maxima_kernel[(maxima.numel(),)](
        x, maxima, num_groups, GELU=gelu, BLOCK=block, num_warps=MAXIMA_WARPS, enable_fp_fusion=False
    )
    return maxima


def seed_on(device: torch.device, seed: int | Tensor | None, rule: Rule) -> Tensor | None:
    """Return a seed as a scalar on the device. Raises ValueError for a rule that would bias stochastic rounding."""
    if seed is not None and rule.is_adaptive:
        raise ValueError(
            f"rule {rule.value!r} chooses a scale after rounding, which biases stochastic rounding; use static6"
        )
    return torch.full((), seed, dtype=torch.int64, device=device) if isinstance(seed, int) else seed


def amax_and_scales(maxima: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Return the largest magnitude, with the lower bound of the rule, and the tensor scale of each row of maxima.

    maxima: bits of the largest magnitudes of P programs, int32 [R, P]. As integers, magnitudes have the order of the
        numbers, and NaN is above all of them.
    """
    rows, count = maxima.shape
    # two allocations: the results of an operator must be aligned for compiled code
    amax, scale = (torch.empty(rows, dtype=torch.float32, device=maxima.device) for _ in range(2))
    block = min(BLOCK_MAXIMA, triton.next_power_of_2(count))
    _tensor_scale_kernel[(rows,)](
        maxima,
        amax,
        scale,
        count,
        SMALLEST_AMAX=rule.smallest_amax,
        LARGEST_PRODUCT=rule.largest_product,
        ROUNDS=triton.cdiv(count, block),
        BLOCK=block,
        num_warps=MAXIMA_WARPS,
    )
    return amax, scale


def _quantize(
    x: Tensor,
    rule: Rule,
    amax: Tensor | None,
    seed: int | Tensor | None,
    block_groups: int,
    *,
    exact_dtype: torch.dtype | None,
    gelu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes or exact values, scales and the tensor scale."""
    check_input(x)
    seed = seed_on(x.device, seed, rule)
    num_groups = x.numel() // GROUP
    grid = (triton.cdiv(num_groups, block_groups),)
    if amax is None:
        maxima = largest_magnitudes(x, gelu=gelu, block_groups=block_groups)
        amax, tensor_scale = (row.squeeze(0) for row in amax_and_scales(maxima, rule))
    else:
        amax = amax.float().clamp_min(rule.smallest_amax)
        tensor_scale = tensor_scale_of(amax, rule)
    codes, scales = empty_outputs(x, exact_dtype)
    per_group = amax.numel() > 1
    _quantize_kernel[grid](
        x,
        amax.expand(scales.shape).contiguous() if per_group else amax,
        seed,
        codes if exact_dtype else codes.view(torch.int32),
        None if exact_dtype else scales,
        num_groups,
        RULE=rule.value,
        ADAPTIVE=rule.is_adaptive,
        STOCHASTIC=seed is not None,
        GELU=gelu,
        EXACT=exact_dtype is not None,
        PER_GROUP=per_group,
        BLOCK=block_groups,
        num_warps=block_warps(block_groups),
        enable_fp_fusion=False,
    )
    return codes, scales.view(torch.float8_e4m3fn), tensor_scale


def block_warps(block_groups: int) -> int:
    """Return the number of warps that gives each group a thread, between 1 and 8."""
    return min(max(block_groups // 32, 1), 8)


def empty_outputs(x: Tensor, exact_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Return empty tensors for codes, or for exact values in a dtype, and for scales as bytes."""
    scales = torch.empty(*x.shape[:-1], x.shape[-1] // GROUP, dtype=torch.uint8, device=x.device)
    if exact_dtype is not None:
        return torch.empty(x.shape, dtype=exact_dtype, device=x.device), scales
    return torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=torch.uint8, device=x.device), scales


def check_input(x: Tensor) -> None:
    check_groups(x.shape)
    check_contiguous(x, "the tensor to quantize")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"cannot quantize {x.dtype}; expected bfloat16, float16 or float32")
    if not x.numel():
        raise ValueError(f"cannot quantize an empty tensor {list(x.shape)}, which has no largest magnitude")


def check_contiguous(x: Tensor, name: str) -> None:
    if not x.is_contiguous():
        raise ValueError(f"{name} {list(x.shape)} has strides {x.stride()}; call .contiguous() first")


@triton.jit
def _load_input(x_ptr, group, inside, GELU: tl.constexpr):
    x = load_groups(x_ptr, group, inside)
    if GELU:
        # 1 + tanh(u) is 2 / (1 + exp(-2u)), without the cancellation
        u = _SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)
        x = round_to(x / (1.0 + tl.exp(-2.0 * u)), x_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _maxima_kernel(x_ptr, maxima_ptr, num_groups, GELU: tl.constexpr, BLOCK: tl.constexpr) -> None:
    program = tl.program_id(0)
    first = program.to(tl.int64) * BLOCK
    group = tl.arange(0, BLOCK)
    x = _load_input(x_ptr + first * GROUP_SIZE, group, group < num_groups - first, GELU)
    tl.store(maxima_ptr + program, tl.max(tl.max(magnitude_bits(x), axis=1), axis=0))


@triton.jit
def _tensor_scale_kernel(
    maxima_ptr,
    amax_ptr,
    scale_ptr,
    count,
    SMALLEST_AMAX: tl.constexpr,
    LARGEST_PRODUCT: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], dtype=tl.int32)
    for turn in range(ROUNDS):
        position = turn * BLOCK + index
        largest = tl.maximum(largest, tl.load(maxima_ptr + row * count + position, mask=position < count, other=0))
    amax = tl.max(largest, axis=0).to(tl.float32, bitcast=True)
    amax = tl.where(amax < SMALLEST_AMAX, SMALLEST_AMAX, amax)
    tl.store(amax_ptr + row, amax)
    tl.store(scale_ptr + row, tl.div_rn(amax, LARGEST_PRODUCT))


@triton.jit
def _quantize_kernel(
    x_ptr,
    amax_ptr,
    seed_ptr,
    codes_ptr,
    scales_ptr,
    num_groups,
    RULE: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    GELU: tl.constexpr,
    EXACT: tl.constexpr,
    PER_GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    first = tl.program_id(0).to(tl.int64) * BLOCK
    group = tl.arange(0, BLOCK)
    inside = group < num_groups - first
    x = _load_input(x_ptr + first * GROUP_SIZE, group, inside, GELU)
    if PER_GROUP:
        amax = tl.load(amax_ptr + first + group, mask=inside, other=1.0)
    else:
        amax = tl.load(amax_ptr)
    draw = 0.0
    if STOCHASTIC:
        draw = uniform(tl.load(seed_ptr), first + group)
    value, byte, scale = quantize_groups(x, amax, draw, RULE, ADAPTIVE, STOCHASTIC)
    if EXACT:
        store_exact(codes_ptr + first * GROUP_SIZE, x, value, scale, group, inside)
    else:
        store_codes(codes_ptr + first * GROUP_WORDS, scales_ptr + first, x, value, byte, group, inside)
