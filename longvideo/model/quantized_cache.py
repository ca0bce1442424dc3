"""A cache that keeps the past in 4 bits and rebuilds it where attention wants it.

Keys are kept before rotation, less their mean over the chunk, values as they are (see `longvideo.kernels.kv_dequant`);
both are quantised once a chunk, in the clean pass. While a chunk is denoised its own keys and values stay in the
workspace at full precision. Keys before rotation quantise better: KVQuant, arXiv 2401.18079.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.kernels.backends import kv_operations
from longvideo.kernels.kv_dequant.format import QuantizedSlots
from longvideo.model.cache import ChunkWindow
from longvideo.model.rope import Rope, rotate

if TYPE_CHECKING:
    from longvideo.model.spec import ChunkSpec


class NVFP4KVCache:
    """A `ChunkCache` in NVFP4: 0.28 of the bytes of bfloat16.

    All layers share one workspace of rotated keys and values, [B, slots, tokens_per_chunk, N, K]. One launch a layer
    rebuilds the kept slots in it; nothing is read back from the device.
    """

    def __init__(
        self,
        spec: ChunkSpec,
        *,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.spec = spec
        self.window = ChunkWindow(spec)
        self._operations = kv_operations(torch.device(device))
        slots, tokens = spec.window_chunks, spec.tokens_per_chunk
        self._layers = [
            QuantizedSlots.allocate(
                slots=slots, batch=batch, tokens=tokens, heads=num_heads, head_dim=head_dim, device=device
            )
            for _ in range(num_layers)
        ]
        workspace = (batch, slots, tokens, num_heads, head_dim)
        self._keys_BSLNK = torch.empty(workspace, dtype=dtype, device=device)
        self._values_BSLNK = torch.empty(workspace, dtype=dtype, device=device)
        rotation = (slots, tokens, head_dim // 2)
        self._cos_SLH = torch.empty(rotation, dtype=torch.float32, device=device)
        self._sin_SLH = torch.empty(rotation, dtype=torch.float32, device=device)
        self._past_slots: Tensor | None = None

    def attended(self, layer: int, keys_BLNK: Tensor, values_BLNK: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        self._rebuild(layer)
        live, end = self.window.begin(), self.window.num_slots
        self._keys_BSLNK[:, live] = rotate(keys_BLNK, rope).to(self._keys_BSLNK.dtype)
        self._values_BSLNK[:, live] = values_BLNK.to(self._values_BSLNK.dtype)
        return self._keys_BSLNK[:, :end].flatten(1, 2), self._values_BSLNK[:, :end].flatten(1, 2)

    def past(self, layer: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            self._rebuild(layer)
            slots = self.window.past_slots()
            return self._keys_BSLNK[:, slots].flatten(1, 2), self._values_BSLNK[:, slots].flatten(1, 2)

    def keep(self, layer: int, keys_BLNK: Tensor, values_BLNK: Tensor, rope: Rope) -> None:
        live = self.window.begin()
        self._operations.write_slot(self._layers[layer], live, keys_BLNK, values_BLNK)
        if layer == 0:
            assert rope.cos.shape[0] == 1, "samples of a batch share their positions, as they share the slots"
            self._cos_SLH[live] = rope.cos[0, :, 0]
            self._sin_SLH[live] = rope.sin[0, :, 0]

    def commit(self, *, cut: bool = False) -> None:
        self.window.commit(cut=cut)
        self._past_slots = None

    @property
    def num_bytes(self) -> int:
        return sum(slots.num_bytes for slots in self._layers)

    def _rebuild(self, layer: int) -> None:
        if self._past_slots is None:
            slots = self.window.past_slots()
            self._past_slots = torch.tensor(slots, dtype=torch.int32, device=self._keys_BSLNK.device)
        if self._past_slots.numel():
            self._operations.rebuild(
                self._layers[layer],
                self._past_slots,
                self._cos_SLH,
                self._sin_SLH,
                self._keys_BSLNK,
                self._values_BSLNK,
            )
