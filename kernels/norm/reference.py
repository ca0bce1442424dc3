"""Operations between the products of a transformer block: the definition, in plain torch.

Shapes: B samples, L tokens, D model dim, T frames of L/T tokens each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3_MAX = 448.0


def add_norm(
    h_BLD: Tensor,
    update_BLD: Tensor | None,
    gate: Tensor | None,
    multiplier: Tensor | None,
    shift: Tensor | None,
    out_BLD: Tensor | None,
    scales_BL: Tensor | None = None,
    *,
    eps: float,
    bias_D: Tensor | None = None,
) -> None:
    """Add gate x (update + bias) to h in place, and write LayerNorm(h) x multiplier + shift to out.

    gate, multiplier, shift: float32, [B, T, D] for each frame of each sample, or [D] for all. A gate of None is 1.
    out: None writes only the sum. In float8_e4m3fn, every token is divided by its own scale.
    scales: float32, receives those scales: the largest magnitude of each token over 448, or 1 where that is zero.
    Arithmetic is in float32; the norm is that of the rounded sum.
    """
    total = h_BLD.float()
    if update_BLD is not None:
        update = update_BLD.float() if bias_D is None else update_BLD.float() + bias_D.float()
        total = total + (update if gate is None else update * _per_token(gate, update))
        h_BLD.copy_(total)
        total = h_BLD.float()
    if out_BLD is None:
        return
    assert multiplier is not None and shift is not None
    normed = F.layer_norm(total, total.shape[-1:], eps=eps)
    normed = normed * _per_token(multiplier, total) + _per_token(shift, total)
    if out_BLD.dtype is torch.float8_e4m3fn:
        assert scales_BL is not None
        largest = normed.abs().amax(-1)
        scales_BL.copy_(torch.where(largest > 0, largest / E4M3_MAX, 1.0))
        normed = (normed / scales_BL[..., None]).clamp(-E4M3_MAX, E4M3_MAX)
    out_BLD.copy_(normed)


def rms_norm(x_BLD: Tensor, gamma_D: Tensor, out_BLD: Tensor, *, eps: float) -> None:
    """Write the RMS norm of every token, times gamma, to out, which may be x. Arithmetic is in float32."""
    out_BLD.copy_(F.rms_norm(x_BLD.float(), x_BLD.shape[-1:], eps=eps) * gamma_D.float())


def _per_token(factor: Tensor, like_BLD: Tensor) -> Tensor:
    """Return the factor of every token, which is that of its frame."""
    if factor.ndim == 1:
        return factor
    return factor.repeat_interleave(like_BLD.shape[1] // factor.shape[1], dim=1)
