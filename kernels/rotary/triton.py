"""Triton kernel between the projections of self-attention and attention itself; `reference` defines it.

One launch reads queries, keys and values once and writes them once, to where attention reads them. Shapes: B samples, L
tokens of the live chunk, N heads, K head dim, H = K / 2 pairs, S slots of the cache.
"""

# a kernel is launched with options and plain constants, which its function does not declare
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from longvideo.kernels.nvfp4.triton.arithmetic import round_to

if TYPE_CHECKING:
    from torch import Tensor

WARPS = 4


def norm_rotate_keep(
    q_BLNK: Tensor,
    k_BLNK: Tensor,
    v_BLNK: Tensor,
    gamma_q: Tensor,
    gamma_k: Tensor,
    cos_LH: Tensor,
    sin_LH: Tensor,
    slot: Tensor,
    rotated_BLNK: Tensor,
    keys_BSLNK: Tensor,
    values_BSLNK: Tensor,
    *,
    eps: float,
    mean_NK: Tensor | None = None,
) -> None:
    """Normalize queries and keys over all heads, rotate them, and write keys and values to their slot of the cache.

    Queries, keys and values may be parts of one product: the heads of a token must be contiguous, but tokens need not
    be adjacent. Bytes moved, where E is the size of an element: 6 E for each of B L N K, and the angles of each token
    twice.
    mean: value to subtract from the values, float32, contiguous.
    Raises ValueError for shapes that do not match, and for heads that are not contiguous.
    """
    batch, tokens, heads, head_dim = q_BLNK.shape
    for name, x in (("q", q_BLNK), ("k", k_BLNK), ("v", v_BLNK), ("rotated", rotated_BLNK)):
        if x.shape != q_BLNK.shape or x.stride()[2:] != (head_dim, 1):
            raise ValueError(
                f"{name} is {list(x.shape)} with strides {list(x.stride())}; expected {list(q_BLNK.shape)} like q, with"
                " contiguous heads"
            )
    for name, x in (("keys", keys_BSLNK), ("values", values_BSLNK)):
        if x.shape != (batch, x.shape[1], tokens, heads, head_dim) or not x.is_contiguous():
            raise ValueError(f"{name} is {list(x.shape)}; expected [{batch}, slots, {tokens}, {heads}, {head_dim}]")
    if cos_LH.shape != (tokens, head_dim // 2) or not (cos_LH.is_contiguous() and sin_LH.is_contiguous()):
        raise ValueError(f"cos is {list(cos_LH.shape)}; expected [{tokens}, {head_dim // 2}]")
    _norm_rotate_keep[(tokens, batch, 3)](
        q_BLNK,
        k_BLNK,
        v_BLNK,
        gamma_q,
        gamma_k,
        cos_LH,
        sin_LH,
        slot,
        rotated_BLNK,
        keys_BSLNK,
        values_BSLNK,
        tokens,
        heads,
        eps,
        q_BLNK.stride(0),
        q_BLNK.stride(1),
        k_BLNK.stride(0),
        k_BLNK.stride(1),
        v_BLNK.stride(0),
        v_BLNK.stride(1),
        rotated_BLNK.stride(0),
        rotated_BLNK.stride(1),
        keys_BSLNK.stride(0),
        q_BLNK if mean_NK is None else mean_NK,
        HAS_MEAN=mean_NK is not None,
        HEADS=triton.next_power_of_2(heads),
        PAIRS=head_dim // 2,
        num_warps=WARPS,
    )


@triton.jit
def _norm_rotate_keep(
    q_pointer,
    k_pointer,
    v_pointer,
    gamma_q_pointer,
    gamma_k_pointer,
    cos_pointer,
    sin_pointer,
    slot_pointer,
    rotated_pointer,
    keys_pointer,
    values_pointer,
    tokens,
    heads,
    eps,
    q_batch,
    q_token,
    k_batch,
    k_token,
    v_batch,
    v_token,
    rotated_batch,
    rotated_token,
    cache_batch,
    mean_pointer,
    HAS_MEAN: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
) -> None:
    token, sample, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    head = tl.arange(0, HEADS)
    inside = (head < heads)[:, None] & (tl.arange(0, 2 * PAIRS) >= 0)[None, :]
    place = head[:, None] * (2 * PAIRS) + tl.arange(0, 2 * PAIRS)[None, :]
    slot = tl.load(slot_pointer).to(tl.int64)
    kept = sample * cache_batch + (slot * tokens + token) * heads * (2 * PAIRS) + place
    if part == 2:
        value = tl.load(v_pointer + sample * v_batch + token * v_token + place, mask=inside, other=0.0).to(tl.float32)
        if HAS_MEAN:
            value -= tl.load(mean_pointer + place, mask=inside, other=0.0)
        tl.store(values_pointer + kept, round_to(value, values_pointer.dtype.element_ty), mask=inside)
    elif part == 1:
        x = tl.load(k_pointer + sample * k_batch + token * k_token + place, mask=inside, other=0.0)
        gamma = tl.load(gamma_k_pointer + place, mask=inside, other=0.0)
        x = _norm_rotate(x, gamma, cos_pointer, sin_pointer, token, heads, eps, HEADS, PAIRS)
        tl.store(keys_pointer + kept, round_to(x, keys_pointer.dtype.element_ty), mask=inside)
    else:
        x = tl.load(q_pointer + sample * q_batch + token * q_token + place, mask=inside, other=0.0)
        gamma = tl.load(gamma_q_pointer + place, mask=inside, other=0.0)
        x = _norm_rotate(x, gamma, cos_pointer, sin_pointer, token, heads, eps, HEADS, PAIRS)
        rotated = rotated_pointer + sample * rotated_batch + token * rotated_token + place
        tl.store(rotated, round_to(x, rotated_pointer.dtype.element_ty), mask=inside)


@triton.jit
def _norm_rotate(x, gamma, cos_pointer, sin_pointer, token, heads, eps, HEADS: tl.constexpr, PAIRS: tl.constexpr):
    """Return the RMS norm of a token [HEADS, 2 PAIRS] over all heads, with rotated pairs, in float32."""
    x = x.to(tl.float32)
    mean_square = tl.sum(tl.sum(x * x, axis=1), axis=0) / (heads * 2 * PAIRS)
    x = x * (1.0 / tl.sqrt(mean_square + eps)) * gamma.to(tl.float32)
    even, odd = tl.split(tl.reshape(x, (HEADS, PAIRS, 2)))
    pair = token * PAIRS + tl.arange(0, PAIRS)
    cos, sin = tl.load(cos_pointer + pair)[None, :], tl.load(sin_pointer + pair)[None, :]
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (HEADS, 2 * PAIRS))
