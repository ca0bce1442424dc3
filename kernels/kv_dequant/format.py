"""Storage of a 4-bit KV cache for one layer: quantized keys before rotation, and quantized values, slot by slot.

The mean of each channel over the tokens of a chunk is subtracted from the keys before they are quantized
("K-smoothing", SageAttention, arXiv 2410.02367). The mean is stored and added again, so it causes no error; the rest is
smaller and quantizes better. Shapes: S slots, B samples, L tokens of a chunk, N heads, K head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longvideo.kernels.nvfp4.format import GROUP


@dataclass(frozen=True)
class QuantizedSlots:
    """Storage of one layer, allocated once. `write_slot` fills it, and `rebuild` reads it.

    codes: uint8 [2, S, B, L, N, K/2], keys then values. scales: float8_e4m3fn [2, S, B, L, N, K/16].
    tensor_scale: float32 [2, S, B]. key_mean: bfloat16 [S, B, N, K].
    """

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor
    key_mean: Tensor

    @classmethod
    def allocate(
        cls, *, slots: int, batch: int, tokens: int, heads: int, head_dim: int, device: torch.device | str = "cpu"
    ) -> QuantizedSlots:
        """Allocate the slots of a layer. Raises ValueError for a head dim that is not a multiple of 16."""
        if head_dim % GROUP:
            raise ValueError(
                f"head_dim is {head_dim}; expected a multiple of {GROUP}, the size of an NVFP4 group; use a bf16 cache"
            )
        shape = (2, slots, batch, tokens, heads)
        return cls(
            codes=torch.empty(*shape, head_dim // 2, dtype=torch.uint8, device=device),
            scales=torch.empty(*shape, head_dim // GROUP, dtype=torch.float8_e4m3fn, device=device),
            tensor_scale=torch.empty(shape[:3], dtype=torch.float32, device=device),
            key_mean=torch.empty(slots, batch, heads, head_dim, dtype=torch.bfloat16, device=device),
        )

    @property
    def num_bytes(self) -> int:
        parts = (self.codes, self.scales, self.tensor_scale, self.key_mean)
        return sum(part.numel() * part.element_size() for part in parts)
