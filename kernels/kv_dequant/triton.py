"""Triton kernels of the 4-bit KV cache: fill a slot, and rebuild keys and values of many slots in one launch.

`reference` defines every bit. Shapes as in `format`: S slots, B samples, L tokens of a chunk, N heads, K head dim.
"""

# a kernel is launched with options and plain constants, which its function does not declare
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from longvideo.kernels.nvfp4.format import GROUP, Rule
from longvideo.kernels.nvfp4.triton.arithmetic import (
    GROUP_SIZE,
    GROUP_WORDS,
    WORD_CODES,
    decode_scale,
    decode_words,
    load_groups,
    magnitude_bits,
    quantize_groups,
    round_to,
    store_codes,
)
from longvideo.kernels.nvfp4.triton.quantizing import (
    BLOCK_GROUPS,
    MAXIMA_BLOCKS,
    MAXIMA_WARPS,
    amax_and_scales,
    block_warps,
)

if TYPE_CHECKING:
    from longvideo.kernels.kv_dequant.format import QuantizedSlots

REBUILD_WARPS = 4
REBUILD_THREADS = 32 * REBUILD_WARPS
REBUILD_HEADS = 4  # heads per program: the rotation of a token is loaded once for them

_WORD_CODES = tl.constexpr(WORD_CODES)
_WORD_PAIRS = tl.constexpr(WORD_CODES // 2)


def write_slot(
    slots: QuantizedSlots,
    slot: int,
    keys_BLNK: Tensor,
    values_BLNK: Tensor,
    rule: Rule = Rule.ADAPTIVE,
    *,
    block_groups: int = BLOCK_GROUPS,
) -> None:
    """Quantize keys before rotation and values of a chunk into a slot. Every sample has its own tensor scale.

    keys, values: [B, L, N, K], contiguous. Bytes moved, where E is the size of an element: 2 E + 9/16 for each element,
        and the mean of the keys, which torch computes in float32.
    Raises ValueError for keys or values that are not contiguous or do not fit the slots.
    """
    batch, tokens, heads, head_dim = _check_slots(slots)
    for name, x in (("keys", keys_BLNK), ("values", values_BLNK)):
        if x.shape != (batch, tokens, heads, head_dim) or not x.is_contiguous():
            raise ValueError(
                f"{name} are {list(x.shape)} with strides {x.stride()}; expected contiguous "
                f"{[batch, tokens, heads, head_dim]} like the slots"
            )
    mean_BNK = keys_BLNK.mean(1, dtype=torch.float32).to(torch.bfloat16)
    slots.key_mean[slot] = mean_BNK
    num_groups = tokens * heads * head_dim // GROUP
    channels = heads * head_dim
    block_maxima = block_groups * MAXIMA_BLOCKS
    maxima = torch.empty(2 * batch, triton.cdiv(num_groups, block_maxima), dtype=torch.int32, device=keys_BLNK.device)
    _maxima_kernel[(maxima.shape[1], batch, 2)](
        keys_BLNK,
        values_BLNK,
        mean_BNK,
        maxima,
        num_groups,
        CHANNELS=channels,
        BLOCK=block_maxima,
        num_warps=MAXIMA_WARPS,
        enable_fp_fusion=False,
    )
    amax_2B, scale_2B = amax_and_scales(maxima, rule)
    slots.tensor_scale[:, slot] = scale_2B.view(2, batch)
    _write_kernel[(triton.cdiv(num_groups, block_groups), batch, 2)](
        keys_BLNK,
        values_BLNK,
        mean_BNK,
        amax_2B,
        slots.codes.view(torch.int32)[:, slot],
        slots.scales.view(torch.uint8)[:, slot],
        slots.scales.stride(0),
        num_groups,
        RULE=rule.value,
        ADAPTIVE=rule.is_adaptive,
        CHANNELS=channels,
        BLOCK=block_groups,
        num_warps=block_warps(block_groups),
        enable_fp_fusion=False,
    )


def rebuild(
    slots: QuantizedSlots,
    which: Tensor,
    cos_SLH: Tensor,
    sin_SLH: Tensor,
    keys_BSLNK: Tensor,
    values_BSLNK: Tensor,
    *,
    block_tokens: int | None = None,
    block_heads: int = REBUILD_HEADS,
) -> None:
    """Write rotated keys and values of some slots into the same slots of a workspace, in one launch.

    which: slot numbers, int32 [count], read on the device, where numbers outside the slots are not detected.
    cos, sin: rotation of every token of every slot, float32 [S, L, K/2], contiguous.
    keys, values: workspace [B, S, L, N, K] with contiguous last two dimensions; the other slots do not change.
        Arithmetic is in float32: code times (scale times tensor scale), plus the mean, rotated in interleaved pairs,
        then rounded once.
    block_tokens: tokens per program, a power of two; by default a thread has one word of 8 codes.
    block_heads: heads per program, which share one load of the rotation.
    Bytes moved for each key and each value: 9/16 and the size of an element of the workspace. Cos and sin add
    4/block_heads for each key, of which 4/N come from memory and the rest from the GPU's cache.
    The host does not wait. Raises ValueError for shapes, dtypes and strides that do not fit.
    """
    batch, tokens, heads, head_dim = _check_slots(slots)
    num_slots = slots.codes.shape[1]
    if head_dim // WORD_CODES & (head_dim // WORD_CODES - 1):
        raise ValueError(f"head_dim is {head_dim}; expected a power of two for the Triton kernel, such as 64 or 128")
    if which.dtype != torch.int32 or which.dim() != 1:
        raise ValueError(f"which is {which.dtype} {list(which.shape)}; expected int32 [count]")
    for name, x in (("cos", cos_SLH), ("sin", sin_SLH)):
        expected = (num_slots, tokens, head_dim // 2)
        if x.shape != expected or x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(f"{name} is {x.dtype} {list(x.shape)}; expected contiguous float32 {list(expected)}")
    for name, x in (("keys", keys_BSLNK), ("values", values_BSLNK)):
        expected = (batch, num_slots, tokens, heads, head_dim)
        if x.shape != expected or x.stride()[3:] != (head_dim, 1):
            raise ValueError(
                f"the workspace of {name} is {list(x.shape)} with strides {x.stride()}; expected {list(expected)}, "
                "contiguous over heads and head dim"
            )
    words = head_dim // WORD_CODES
    block_tokens = block_tokens or max(REBUILD_THREADS // words, 1)
    count = which.numel()
    if not count:
        return
    _rebuild_kernel[(triton.cdiv(tokens, block_tokens), triton.cdiv(heads, block_heads), count * batch)](
        slots.codes.view(torch.int32),
        slots.scales.view(torch.uint8),
        slots.tensor_scale,
        slots.key_mean,
        which,
        cos_SLH,
        sin_SLH,
        keys_BSLNK,
        values_BSLNK,
        num_slots,
        batch,
        tokens,
        *keys_BSLNK.stride()[:3],
        *values_BSLNK.stride()[:3],
        HEADS=heads,
        WORDS=words,
        BLOCK_TOKENS=block_tokens,
        BLOCK_HEADS=block_heads,
        num_warps=REBUILD_WARPS,
        enable_fp_fusion=False,
    )


def _check_slots(slots: QuantizedSlots) -> tuple[int, int, int, int]:
    """Return the numbers of samples, tokens and heads, and the head dim."""
    for part in (slots.codes, slots.scales, slots.tensor_scale, slots.key_mean):
        assert part.is_contiguous(), "slots are allocated contiguous and never replaced"
    _, _, batch, tokens, heads, half = slots.codes.shape
    return batch, tokens, heads, half * 2


@triton.jit
def _load_smoothed(keys_ptr, values_ptr, mean_ptr, num_groups, group, inside, CHANNELS: tl.constexpr):
    """Load groups of this program's sample: keys minus their mean if the third grid index is 0, otherwise values."""
    sample, kind = tl.program_id(1).to(tl.int64), tl.program_id(2)
    own_group = sample * num_groups + group
    if kind == 0:
        x = load_groups(keys_ptr, own_group, inside)
        channel_group = group % (CHANNELS // GROUP_SIZE)
        x -= load_groups(mean_ptr + sample * CHANNELS, channel_group, inside)
    else:
        x = load_groups(values_ptr, own_group, inside)
    return x


@triton.jit
def _maxima_kernel(
    keys_ptr, values_ptr, mean_ptr, maxima_ptr, num_groups, CHANNELS: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    block = tl.program_id(0)
    group = block * BLOCK + tl.arange(0, BLOCK)
    x = _load_smoothed(keys_ptr, values_ptr, mean_ptr, num_groups, group, group < num_groups, CHANNELS)
    row = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    largest = tl.max(tl.max(magnitude_bits(x), axis=1), axis=0)
    tl.store(maxima_ptr + row * tl.num_programs(0) + block, largest)


@triton.jit
def _write_kernel(
    keys_ptr,
    values_ptr,
    mean_ptr,
    amax_ptr,
    codes_ptr,
    scales_ptr,
    kind_groups,
    num_groups,
    RULE: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    sample, kind = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = group < num_groups
    x = _load_smoothed(keys_ptr, values_ptr, mean_ptr, num_groups, group, inside, CHANNELS)
    amax = tl.load(amax_ptr + kind * tl.num_programs(1) + sample)
    value, byte, scale = quantize_groups(x, amax, 0.0, RULE, ADAPTIVE, False)
    first = kind * kind_groups + sample * num_groups
    store_codes(codes_ptr + first * GROUP_WORDS, scales_ptr + first, x, value, byte, group, inside)


@triton.jit
def _rebuild_kernel(
    words_ptr,
    scales_ptr,
    tensor_scale_ptr,
    mean_ptr,
    which_ptr,
    cos_ptr,
    sin_ptr,
    keys_ptr,
    values_ptr,
    num_slots,
    batch,
    tokens,
    keys_stride_b,
    keys_stride_s,
    keys_stride_l,
    values_stride_b,
    values_stride_s,
    values_stride_l,
    HEADS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
) -> None:
    slot = tl.load(which_ptr + tl.program_id(2) // batch).to(tl.int64)
    sample = (tl.program_id(2) % batch).to(tl.int64)
    # one row for each word of eight codes of a head; a thread has one row, and 16 bytes of each output
    row = tl.arange(0, BLOCK_TOKENS * WORDS)
    word = row % WORDS
    token = tl.program_id(0) * BLOCK_TOKENS + row // WORDS
    lane = tl.arange(0, _WORD_CODES)
    inside = token < tokens

    pair = word[:, None] * _WORD_PAIRS + tl.arange(0, _WORD_PAIRS)[None, :]
    rotation = slot * tokens * (WORDS * _WORD_PAIRS) + token[:, None] * (WORDS * _WORD_PAIRS) + pair
    cos = tl.load(cos_ptr + rotation, mask=inside[:, None], other=0.0)
    sin = tl.load(sin_ptr + rotation, mask=inside[:, None], other=0.0)

    # the keys of all slots are stored first, then the values
    key_sample = slot * batch + sample
    value_sample = (slot + num_slots) * batch + sample
    key_tensor_scale = tl.load(tensor_scale_ptr + key_sample)
    value_tensor_scale = tl.load(tensor_scale_ptr + value_sample)
    key_words_ptr = words_ptr + key_sample * tokens * (HEADS * WORDS)
    value_words_ptr = words_ptr + value_sample * tokens * (HEADS * WORDS)
    key_scales_ptr = scales_ptr + key_sample * tokens * (HEADS * WORDS // 2)
    value_scales_ptr = scales_ptr + value_sample * tokens * (HEADS * WORDS // 2)
    mean_ptr += key_sample * (HEADS * WORDS * _WORD_CODES)
    keys_ptr += sample * keys_stride_b + slot * keys_stride_s
    values_ptr += sample * values_stride_b + slot * values_stride_s
    column = word[:, None] * _WORD_CODES + lane[None, :]

    for index in range(BLOCK_HEADS):
        head = tl.program_id(1) * BLOCK_HEADS + index
        # no second condition if the block divides the heads
        here = inside if HEADS % BLOCK_HEADS == 0 else inside & (head < HEADS)
        offset = (token * HEADS + head) * WORDS + word
        scale_offset = (token * HEADS + head) * (WORDS // 2) + word // 2
        key_word = tl.load(key_words_ptr + offset, mask=here, other=0).to(tl.uint32, bitcast=True)
        value_word = tl.load(value_words_ptr + offset, mask=here, other=0).to(tl.uint32, bitcast=True)
        key_scale = decode_scale(tl.load(key_scales_ptr + scale_offset, mask=here, other=0)) * key_tensor_scale
        value_scale = decode_scale(tl.load(value_scales_ptr + scale_offset, mask=here, other=0)) * value_tensor_scale
        head_column = head * (WORDS * _WORD_CODES) + column
        mean = tl.load(mean_ptr + head_column, mask=here[:, None], other=0.0).to(tl.float32)

        key = decode_words(key_word, lane) * key_scale[:, None] + mean
        even, odd = tl.split(tl.reshape(key, (BLOCK_TOKENS * WORDS, _WORD_PAIRS, 2)))
        rotated = tl.join(even * cos - odd * sin, even * sin + odd * cos)
        rotated = tl.reshape(rotated, (BLOCK_TOKENS * WORDS, _WORD_CODES))
        value = decode_words(value_word, lane) * value_scale[:, None]
        rotated = round_to(rotated, keys_ptr.dtype.element_ty)
        value = round_to(value, values_ptr.dtype.element_ty)
        tl.store(keys_ptr + token[:, None] * keys_stride_l + head_column, rotated, mask=here[:, None])
        tl.store(values_ptr + token[:, None] * values_stride_l + head_column, value, mask=here[:, None])
