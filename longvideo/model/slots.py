"""Storage of the keys and values of the chunks already made, in slots that never move.

`ChunkWindow` decides which chunk is in which slot. The number of the live chunk's slot is read on the device, so that
one recorded sequence of kernels serves every chunk with the same number of slots in use.

Shapes: B samples, S slots, L tokens of a chunk, N heads, K head dim, H = K / 2 rotated pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from longvideo.kernels.backends import kv_operations
from longvideo.kernels.kv_dequant.format import QuantizedSlots
from longvideo.model.spec import ChunkSpec

WORD = torch.int64
"""Dtype in which keys and values are copied or exchanged: no operation needs to support FP8 or moves single bytes."""


@dataclass(frozen=True)
class CacheSizes:
    """Sizes of the storage of keys and values, its dtype and its device.

    num_heads: heads whose keys and values are stored, of every layer. batch: number of samples, with the copies for
    guidance.
    """

    spec: ChunkSpec
    num_layers: int
    num_heads: int
    head_dim: int
    batch: int = 1
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")

    def of_chunks(self, count: int) -> tuple[int, int, int, int, int]:
        """Return the shape [B, S, L, N, K] of the keys of a number of chunks in one layer."""
        return self.batch, count, self.spec.tokens_per_chunk, self.num_heads, self.head_dim


@dataclass(frozen=True)
class SlotsInUse:
    """The slots of a window while one chunk is live.

    live: slot of the live chunk. past: slots that it attends to, without its own.
    exact: for every place of an exact copy, the slot whose chunk is read from this copy. For a copy that is not read it
        is the live slot, which is written after the past is opened.
    live_place: place of the exact copy of the live chunk.
    """

    live: int
    past: tuple[int, ...]
    exact: tuple[int, ...]
    live_place: int


class Slots(Protocol):
    """Storage of all layers. A pass opens one layer after the other, and may then keep it.

    copies: whether `keep` stores anything. Otherwise the live chunk stays as it was written into its slot.
    live: slot of the live chunk, an int64 scalar on the device.
    """

    copies: bool
    live: Tensor

    def __init__(self, sizes: CacheSizes, /) -> None: ...

    def begin(self, slots: SlotsInUse, /) -> None:
        """Set the slot of the live chunk and the slots that it attends to, without waiting for the device."""
        ...

    def set_rotation(self, live: int, cos_LH: Tensor, sin_LH: Tensor, /) -> None:
        """Set the rotation of the live chunk's keys, which is needed once the chunk is part of the past."""
        ...

    def open(self, layer: int, num_past: int, /) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, S, L, N, K] of a layer, in which the live slot is still to be written.

        num_past: number of slots set by `begin`. The tensors are valid until the next call.
        """
        ...

    def keep(self, layer: int, keys_BLNK: Tensor, values_BLNK: Tensor, /) -> None:
        """Keep the live chunk, which has been written to its slot of the open layer, for later chunks.

        keys: normalized, before rotation.
        """
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes that grow with layers and slots, without what all layers share."""
        ...


class PlainSlots:
    """Rotated keys and values, attended to where they are stored."""

    copies = False

    def __init__(self, sizes: CacheSizes) -> None:
        shape = sizes.of_chunks(sizes.spec.window_chunks)
        self._stored = [
            tuple(torch.empty(2, *shape, dtype=sizes.dtype, device=sizes.device).unbind())
            for _ in range(sizes.num_layers)
        ]
        self.live = torch.zeros((), dtype=torch.int64, device=sizes.device)

    def begin(self, slots: SlotsInUse) -> None:
        self.live.fill_(slots.live)

    def set_rotation(self, live: int, cos_LH: Tensor, sin_LH: Tensor) -> None:
        """Do nothing: keys are stored after rotation."""

    def open(self, layer: int, _num_past: int, /) -> tuple[Tensor, Tensor]:
        keys, values = self._stored[layer]
        return keys, values

    def keep(self, layer: int, keys_BLNK: Tensor, values_BLNK: Tensor) -> None:
        """Do nothing: the live chunk stays where it was written."""

    @property
    def num_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for stored in self._stored for part in stored)


class NVFP4Slots:
    """Keys and values in 4 bits (0.28 of the bytes of bfloat16), and a workspace in which a layer's past is rebuilt.

    Keys are stored before rotation, minus their mean over the chunk, because they quantize better so (KVQuant, arXiv
    2401.18079); values as they are. Both are quantized once a chunk, in `keep`; until then the live chunk's keys and
    values are in the workspace at full precision. See `longvideo.kernels.kv_dequant`.

    A layer is rebuilt when it is opened: rebuilding the next layer at the same time, on another stream, made a step no
    faster, and a recorded pass with two branches delayed the work of other streams (docs/performance.md).
    """

    copies = True

    def __init__(self, sizes: CacheSizes) -> None:
        slots, tokens, device = sizes.spec.window_chunks, sizes.spec.tokens_per_chunk, sizes.device

        def allocate(count: int) -> QuantizedSlots:
            return QuantizedSlots.allocate(
                slots=count,
                batch=sizes.batch,
                tokens=tokens,
                heads=sizes.num_heads,
                head_dim=sizes.head_dim,
                device=device,
            )

        self._operations = kv_operations(device)
        self._layers, self._fresh = [allocate(slots) for _ in range(sizes.num_layers)], allocate(1)
        # zeros: the workspace may be attended to before all of its slots have been written
        workspace = torch.zeros(2, *sizes.of_chunks(slots), dtype=sizes.dtype, device=device)
        self._keys, self._values = workspace.unbind()
        self._cos_SLH, self._sin_SLH = torch.zeros(2, slots, tokens, sizes.head_dim // 2, device=device).unbind()
        self.live = torch.zeros((), dtype=torch.int64, device=device)
        self._past = torch.zeros(slots, dtype=torch.int32, device=device)

    def begin(self, slots: SlotsInUse) -> None:
        self.live.fill_(slots.live)
        for place, slot in enumerate(slots.past):
            self._past[place].fill_(slot)

    def set_rotation(self, live: int, cos_LH: Tensor, sin_LH: Tensor) -> None:
        self._cos_SLH[live].copy_(cos_LH)
        self._sin_SLH[live].copy_(sin_LH)

    def open(self, layer: int, num_past: int) -> tuple[Tensor, Tensor]:
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


class NVFP4MixedSlots(NVFP4Slots):
    """Slots in 4 bits, with exact copies of the chunks of the sink and of the newest finished chunk.

    A copy has the keys after rotation and the values as `PlainSlots` has them. After a layer is rebuilt from 4 bits,
    the copies overwrite their chunks in the workspace. The number of copies and their addresses never change; the slot
    of each is read on the device. Every chunk has its 4-bit form, from which it is read once it is not one of these.
    """

    def __init__(self, sizes: CacheSizes) -> None:
        super().__init__(sizes)
        count, device = sizes.spec.exact_chunks, sizes.device
        self._copies = [
            torch.empty(2, *sizes.of_chunks(count), dtype=sizes.dtype, device=device).view(WORD)
            for _ in range(sizes.num_layers)
        ]
        self._exact = torch.zeros(count, dtype=torch.int64, device=device)
        self._live_place = torch.zeros((), dtype=torch.int64, device=device)

    def begin(self, slots: SlotsInUse) -> None:
        super().begin(slots)
        for place, slot in enumerate(slots.exact):
            self._exact[place].fill_(slot)
        self._live_place.fill_(slots.live_place)

    def open(self, layer: int, num_past: int) -> tuple[Tensor, Tensor]:
        workspace = super().open(layer, num_past)
        if num_past:
            for rebuilt, copies in zip(workspace, self._copies[layer], strict=True):
                rebuilt.view(WORD).index_copy_(1, self._exact, copies)
        return workspace

    def keep(self, layer: int, keys_BLNK: Tensor, values_BLNK: Tensor) -> None:
        super().keep(layer, keys_BLNK, values_BLNK)
        live, place = self.live.reshape(1), self._live_place.reshape(1)
        for written, copies in zip((self._keys, self._values), self._copies[layer], strict=True):
            copies.index_copy_(1, place, written.view(WORD).index_select(1, live))

    @property
    def num_bytes(self) -> int:
        return super().num_bytes + sum(copies.numel() * copies.element_size() for copies in self._copies)
