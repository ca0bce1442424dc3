"""Attention on E4M3 queries, keys and values in plain torch, which defines the operation.

Shapes: B samples, L queries, S keys, N heads, K head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max


def attend_fp8(
    q_BLNK: Tensor,
    k_BSNK: Tensor,
    v_BSNK: Tensor,
    *,
    scale_p: float = 256.0,
    scale_out: float = 1.0,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Return softmax(q k^T / sqrt(K)) v without a mask, times scale_out, in out_dtype [B, L, N, K].

    P = exp(logit - largest logit of the row), in [0, 1], is multiplied by scale_p and rounded to E4M3 before the
    product with the values; the row sum is that of the unrounded P. The rest is float32. Magnitudes above 448 become
    448.

    Hardware processes the keys in blocks. There, P is relative to the largest logit so far, so P is rounded differently
    and rescaled later, and the sums have another order. Neither result is better: both errors are as large as the
    distance between this function and float32 attention. The online softmax is that of FlashAttention-3
    (arXiv:2407.08608).
    """
    q_BNLK, k_BNSK, v_BNSK = (x.float().transpose(1, 2) for x in (q_BLNK, k_BSNK, v_BSNK))
    logit_BNLS = q_BNLK @ k_BNSK.transpose(-1, -2) * q_BLNK.shape[-1] ** -0.5
    p_BNLS = torch.exp(logit_BNLS - logit_BNLS.amax(-1, keepdim=True))
    rounded_BNLS = to_e4m3(p_BNLS * scale_p).float() / scale_p
    out_BNLK = rounded_BNLS @ v_BNSK / p_BNLS.sum(-1, keepdim=True) * scale_out
    out_BLNK = out_BNLK.transpose(1, 2)
    return to_e4m3(out_BLNK) if out_dtype == E4M3 else out_BLNK.to(out_dtype)


def to_e4m3(x: Tensor) -> Tensor:
    """Return the nearest E4M3 values; magnitudes above 448 become 448, as on hardware, where a plain cast gives NaN."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
