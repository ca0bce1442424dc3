"""The operation between the projections of self-attention and attention itself: the definition, in plain torch.

Shapes: B samples, L tokens of the live chunk, N heads, K head dim, H = K / 2 pairs, S slots of the cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3_MAX = 448.0


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

    gamma: weights of the RMS norms, [N K]. cos, sin: rotation, float32. slot: slot number, an integer scalar on the
        device, so that one recorded launch serves all slots. rotated_BLNK: output for the queries.
    mean: value to subtract from the values, float32. Arithmetic is in float32; results are rounded when stored.
    """
    values_BLNK = v_BLNK if mean_NK is None else v_BLNK.float() - mean_NK
    rotated_BLNK.copy_(_rounded_like(_norm_rotate(q_BLNK, gamma_q, cos_LH, sin_LH, eps), rotated_BLNK))
    for stored_BSLNK, x in (
        (keys_BSLNK, _norm_rotate(k_BLNK, gamma_k, cos_LH, sin_LH, eps)),
        (values_BSLNK, values_BLNK),
    ):
        # as bytes: not every operation supports FP8
        as_bytes = stored_BSLNK.view(torch.uint8)
        as_bytes.index_copy_(
            1, slot.reshape(1).long(), _rounded_like(x, stored_BSLNK).contiguous().view(torch.uint8)[:, None]
        )


def _rounded_like(x: Tensor, like: Tensor) -> Tensor:
    """Return x in the dtype of `like`; FP8 saturates."""
    if like.dtype is torch.float8_e4m3fn:
        x = x.float().clamp(-E4M3_MAX, E4M3_MAX)
    return x.to(like.dtype)


def _norm_rotate(x_BLNK: Tensor, gamma: Tensor, cos_LH: Tensor, sin_LH: Tensor, eps: float) -> Tensor:
    heads, head_dim = x_BLNK.shape[-2:]
    normed = F.rms_norm(x_BLNK.float().flatten(-2), (heads * head_dim,), eps=eps) * gamma.float()
    even, odd = normed.unflatten(-1, (heads, head_dim // 2, 2)).unbind(-1)
    cos, sin = cos_LH[:, None], sin_LH[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
