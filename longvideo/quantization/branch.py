"""Low-rank updates of a layer that are computed next to the product of its weight (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRankBranch(nn.Module):
    """A frozen update `up @ down` of a weight that is not changed, since its few bits would lose the update.

    down: [rank, in]. up: [out, rank], multiplied by all scales.
    """

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.register_buffer("down", down)
        self.register_buffer("up", up)

    def forward(self, output: Tensor, x: Tensor) -> Tensor:
        """Return the output of a layer plus the update's. x: input of the layer, not rounded."""
        return add_low_rank(output, x, self.get_buffer("down"), self.get_buffer("up"))


def add_low_rank(output: Tensor, x: Tensor, down: Tensor, up: Tensor, *, scale: float = 1.0) -> Tensor:
    """Return output [..., out] plus `scale * (x @ down.T) @ up.T`.

    It is computed in the dtype of x: with fp32 weights and bf16 inputs the weights are rounded, since the inputs are
    far larger.
    """
    narrow = F.linear(x, down.to(x.dtype)).flatten(0, -2)
    return torch.addmm(output.flatten(0, -2), narrow, up.to(x.dtype).T, alpha=scale).view(output.shape)
