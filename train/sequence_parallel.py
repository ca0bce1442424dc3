"""Self-attention over a video whose tokens are divided over several ranks.

Every rank has all heads of its own tokens; attention needs all tokens of some heads. One all-to-all exchanges queries,
keys and values, another one the result (DeepSpeed-Ulysses, arXiv 2309.14509). Each rank holds the clean and the noisy
copy of the same frames, so that all ranks have the same work and the same share of the loss (LongLive 2.0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from longvideo.model.rope import Rope, rotate

if TYPE_CHECKING:
    from longvideo.model.attention import StaticPattern


class UlyssesAttention:
    """Attend like `pattern`, whose layout covers the tokens of all ranks, rank by rank.

    Raises ValueError in a call if the number of ranks does not divide the number of heads.
    """

    def __init__(self, pattern: StaticPattern, group: dist.ProcessGroup) -> None:
        self.pattern = pattern
        self.group = group
        self.ranks = dist.get_world_size(group)

    def __call__(self, _layer: int, q_BLNK: Tensor, k_BLNK: Tensor, v_BLNK: Tensor, rope: Rope) -> Tensor:
        q, k = (rotate(x, rope).to(v_BLNK.dtype) for x in (q_BLNK, k_BLNK))
        return self.tokens(self.pattern.rotated(*self.heads(q, k, v_BLNK)))

    def heads(self, *own: Tensor) -> tuple[Tensor, ...]:
        """Exchange own tokens of all heads, [B, L, N, K] each, for all tokens of own heads, [B, R L, N/R, K] each."""
        batch, length, heads, _ = own[0].shape
        if heads % self.ranks:
            raise ValueError(f"{self.ranks} ranks cannot share {heads} heads evenly; use a divisor of {heads}")
        # tokens come before the tensors that are exchanged together: for one video, the result is in place already
        parts = [x.unflatten(2, (self.ranks, -1)).permute(2, 0, 1, 3, 4) for x in own]
        received_RBLXNK = self._exchange(torch.stack(parts, dim=3))
        all_BLXNK = received_RBLXNK.transpose(0, 1).reshape(batch, self.ranks * length, *received_RBLXNK.shape[3:])
        return all_BLXNK.unbind(2)

    def tokens(self, x_BLNK: Tensor) -> Tensor:
        """Exchange all tokens of own heads for own tokens of all heads."""
        received_RBLNK = self._exchange(x_BLNK.unflatten(1, (self.ranks, -1)).transpose(0, 1).contiguous())
        return received_RBLNK.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def _exchange(self, x_R: Tensor) -> Tensor:
        """Send part r to rank r; part r of the result comes from rank r."""
        return all_to_all_single_autograd(x_R, None, None, self.group)
