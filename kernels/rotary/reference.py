"""What comes between the projections of self-attention and attention itself, in plain torch; defines `triton`.

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
    """Normalise queries and keys over all heads, rotate them, and put keys and values into their slot of the cache.

    gamma: [N K], of the RMS norms. cos, sin: float32. slot: integer scalar on the device, so that one recorded launch
    serves all slots. Queries go to rotated_BLNK. mean: float32, what is taken off the values. Arithmetic is in float32
    and rounded where it is stored.
    """
    values_BLNK = v_BLNK if mean_NK is None else v_BLNK.float() - mean_NK
    rotated_BLNK.copy_(_held(_norm_rotate(q_BLNK, gamma_q, cos_LH, sin_LH, eps), rotated_BLNK))
    for stored_BSLNK, x in (
        (keys_BSLNK, _norm_rotate(k_BLNK, gamma_k, cos_LH, sin_LH, eps)),
        (values_BSLNK, values_BLNK),
    ):
        # as bytes: not every operation knows FP8
        as_bytes = stored_BSLNK.view(torch.uint8)
        as_bytes.index_copy_(1, slot.reshape(1).long(), _held(x, stored_BSLNK).contiguous().view(torch.uint8)[:, None])


def _held(x: Tensor, like: Tensor) -> Tensor:
    """Round to what `like` holds; FP8 saturates."""
    if like.dtype is torch.float8_e4m3fn:
        x = x.float().clamp(-E4M3_MAX, E4M3_MAX)
    return x.to(like.dtype)


def _norm_rotate(x_BLNK: Tensor, gamma: Tensor, cos_LH: Tensor, sin_LH: Tensor, eps: float) -> Tensor:
    heads, head_dim = x_BLNK.shape[-2:]
    normed = F.rms_norm(x_BLNK.float().flatten(-2), (heads * head_dim,), eps=eps) * gamma.float()
    even, odd = normed.unflatten(-1, (heads, head_dim // 2, 2)).unbind(-1)
    cos, sin = cos_LH[:, None], sin_LH[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
