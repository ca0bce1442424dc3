"""Keys and values of the chunks already made, in slots whose numbers are read on the device.

So one recorded sequence of launches serves every chunk of the same number of slots in use. Which chunk has which slot
is `ChunkWindow`'s to say. Shapes: B samples, S slots, L tokens of a chunk, N heads, K head dim, H = K / 2 pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from longvideo.kernels.backends import kv_operations
from longvideo.kernels.kv_dequant.format import QuantizedSlots

if TYPE_CHECKING:
    from longvideo.model.spec import ChunkSpec


class Slots(Protocol):
    """Storage of all layers. A pass asks for one after the other: `opened`, then perhaps `keep`.

    copies: whether `keep` does anything; otherwise the live slot is kept as it was written.
    live: the live chunk's slot, an int64 scalar on the device.
    """

    copies: bool
    live: Tensor

    def begin(self, live: int, past: list[int], cos_LH: Tensor, sin_LH: Tensor) -> None:
        """Say where the live chunk goes and what it looks back at; numbers are written without waiting."""
        ...

    def opened(self, layer: int, num_past: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, S, L, N, K] in which the past of a layer stands, to write the live slot into.

        They are the layer's until another one is opened.
        """
        ...

    def keep(self, layer: int, keys_BLNK: Tensor, values_BLNK: Tensor) -> None:
        """Keep the live chunk for later chunks; keys are normalised, and not rotated."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes that grow with layers and slots; not what all layers share."""
        ...


class PlainSlots:
    """Rotated keys and values, attended to where they lie."""

    copies = False

    def __init__(
        self,
        spec: ChunkSpec,
        *,
        layers: int,
        batch: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        shape = (batch, spec.window_chunks, spec.tokens_per_chunk, heads, head_dim)
        self._stored = [tuple(torch.empty(2, *shape, dtype=dtype, device=device).unbind()) for _ in range(layers)]
        self.live = torch.zeros((), dtype=torch.int64, device=device)

    def begin(self, live: int, past: list[int], cos_LH: Tensor, sin_LH: Tensor) -> None:
        self.live.fill_(live)

    def opened(self, layer: int, num_past: int) -> tuple[Tensor, Tensor]:
        keys, values = self._stored[layer]
        return keys, values

    def keep(self, layer: int, keys_BLNK: Tensor, values_BLNK: Tensor) -> None:
        """Do nothing: the live chunk is where it stays."""

    @property
    def num_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for stored in self._stored for part in stored)


class NVFP4Slots:
    """Keys before rotation and values in 4 bits, and a workspace in which the past of one layer is rebuilt.

    See `longvideo.model.quantized_cache` for what is kept. A layer is rebuilt when it is its turn: to rebuild the next
    one meanwhile, on a stream of its own, made a step no faster, and a recorded pass with two branches made the work of
    other streams wait (docs/performance.md).
    """

    copies = True

    def __init__(
        self,
        spec: ChunkSpec,
        *,
        layers: int,
        batch: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        slots, tokens = spec.window_chunks, spec.tokens_per_chunk

        def allocate(count: int) -> QuantizedSlots:
            return QuantizedSlots.allocate(
                slots=count, batch=batch, tokens=tokens, heads=heads, head_dim=head_dim, device=device
            )

        self._operations = kv_operations(device)
        self._layers, self._fresh = [allocate(slots) for _ in range(layers)], allocate(1)
        shape = (batch, slots, tokens, heads, head_dim)
        # zeros: it may be attended to before all of its slots were ever written
        self._keys, self._values = torch.zeros(2, *shape, dtype=dtype, device=device).unbind()
        self._cos_SLH, self._sin_SLH = torch.zeros(2, slots, tokens, head_dim // 2, device=device).unbind()
        self.live = torch.zeros((), dtype=torch.int64, device=device)
        self._past = torch.zeros(slots, dtype=torch.int32, device=device)

    def begin(self, live: int, past: list[int], cos_LH: Tensor, sin_LH: Tensor) -> None:
        self.live.fill_(live)
        for place, slot in enumerate(past):
            self._past[place].fill_(slot)
        self._cos_SLH[live].copy_(cos_LH)
        self._sin_SLH[live].copy_(sin_LH)

    def opened(self, layer: int, num_past: int) -> tuple[Tensor, Tensor]:
        if num_past:
            self._operations.rebuild(
                self._layers[layer], self._past[:num_past], self._cos_SLH, self._sin_SLH, self._keys, self._values
            )
        return self._keys, self._values

    def keep(self, layer: int, keys_BLNK: Tensor, values_BLNK: Tensor) -> None:
        fresh, kept, where = self._fresh, self._layers[layer], self.live.reshape(1)
        self._operations.write_slot(fresh, 0, keys_BLNK.contiguous(), values_BLNK.contiguous())
        kept.codes.index_copy_(1, where, fresh.codes)
        kept.scales.view(torch.uint8).index_copy_(1, where, fresh.scales.view(torch.uint8))
        kept.tensor_scale.index_copy_(1, where, fresh.tensor_scale)
        kept.key_mean.index_copy_(0, where, fresh.key_mean)

    @property
    def num_bytes(self) -> int:
        return sum(layer.num_bytes for layer in self._layers)
