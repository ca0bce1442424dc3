"""What comes between the projections of self-attention and attention itself, in plain torch; defines `triton`.

Shapes: B samples, L tokens of the live chunk, N heads, K head dim, H = K / 2 pairs, S slots of the cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
) -> None:
    """Normalise queries and keys over all heads, rotate them, and put keys and values into their slot of the cache.

    gamma: [N K], of the RMS norms. cos, sin: float32. slot: integer scalar on the device, so that one recorded launch
    serves all slots. Queries go to rotated_BLNK. Arithmetic is in float32 and rounded where it is stored.
    """
    rotated_BLNK.copy_(_norm_rotate(q_BLNK, gamma_q, cos_LH, sin_LH, eps))
    index = slot.reshape(1).long()
    keys_BSLNK.index_copy_(1, index, _norm_rotate(k_BLNK, gamma_k, cos_LH, sin_LH, eps).to(keys_BSLNK)[:, None])
    values_BSLNK.index_copy_(1, index, v_BLNK.to(values_BSLNK)[:, None])


def _norm_rotate(x_BLNK: Tensor, gamma: Tensor, cos_LH: Tensor, sin_LH: Tensor, eps: float) -> Tensor:
    heads, head_dim = x_BLNK.shape[-2:]
    normed = F.rms_norm(x_BLNK.float().flatten(-2), (heads * head_dim,), eps=eps) * gamma.float()
    even, odd = normed.unflatten(-1, (heads, head_dim // 2, 2)).unbind(-1)
    cos, sin = cos_LH[:, None], sin_LH[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
