"""The window of chunks that the live chunk attends to, and the cache of their keys and values.

The window is arithmetic on integers on the host. When it is full, the oldest chunk that is neither a sink nor the pin
is evicted, and the next chunk is written to its slot. Attention without a mask does not depend on the order of the
keys, so nothing is moved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from longvideo.model.rope import Rope, rotate
from longvideo.model.slots import CacheSizes, NVFP4MixedSlots, NVFP4Slots, PlainSlots, Slots, SlotsInUse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longvideo.model.spec import ChunkSpec

CachePrecision = Literal["bf16", "nvfp4", "nvfp4-mixed"]
"""Number format of the KV cache; `CACHES` has the class of each."""


class ChunkWindow:
    """The chunk in each slot, and in each place where a mixed cache has an exact copy.

    `begin` gives the live chunk a slot, `commit` makes it part of the past.
    """

    def __init__(self, spec: ChunkSpec) -> None:
        self.spec = spec
        self.chunks: list[int] = []
        self.next_chunk = 0
        self.live_slot: int | None = None
        self._pin: int | None = None
        self._copied: list[int | None] = [None] * spec.exact_chunks  # chunk in each place of an exact copy

    def begin(self) -> int:
        """Return the slot of the live chunk, after evicting a chunk if all slots are in use.

        Later calls for the same chunk return the same slot.
        """
        if self.live_slot is None:
            if len(self.chunks) < self.spec.window_chunks:
                self.live_slot = len(self.chunks)
                self.chunks.append(self.next_chunk)
            else:
                evicted = min(c for c in self.chunks if c >= self.spec.sink_chunks and c != self._pin)
                self.live_slot = self.chunks.index(evicted)
                self.chunks[self.live_slot] = self.next_chunk
        return self.live_slot

    def commit(self, *, cut: bool = False) -> None:
        """Make the live chunk part of the past. cut: whether it opened a shot; it then replaces the pin."""
        assert self.live_slot is not None, "commit without begin"
        self._copied[self._live_place()] = self.next_chunk
        if cut and self.spec.pin_shots and self.next_chunk > 0:
            self._pin = self.next_chunk
        self.next_chunk += 1
        self.live_slot = None

    def skip_to(self, chunk: int) -> None:
        """Continue with a later chunk; the chunks between are not in the window."""
        is_open = self.live_slot is not None
        assert chunk == self.next_chunk or (chunk > self.next_chunk and not is_open), (chunk, self.next_chunk)
        self.next_chunk = chunk

    def past_slots(self) -> list[int]:
        """Return the slots that the live chunk attends to, without its own."""
        live = self.begin()
        return [slot for slot in range(self.num_slots) if slot != live]

    def slots(self) -> SlotsInUse:
        """Begin the live chunk, and return the slots in use."""
        live, past = self.begin(), self.past_slots()
        finished = {self.chunks[slot]: slot for slot in past}
        exact = [live if chunk is None else finished.get(chunk, live) for chunk in self._copied]
        return SlotsInUse(live, tuple(past), tuple(exact), self._live_place())

    @property
    def num_slots(self) -> int:
        """Number of slots in use, with that of the live chunk; they are always the first ones."""
        return len(self.chunks)

    def _live_place(self) -> int:
        """Return the place of the live chunk's exact copy: one for each chunk of the sink, then one for the newest."""
        return min(self.next_chunk, self.spec.sink_chunks)


def past_chunks(spec: ChunkSpec, cuts: Sequence[bool]) -> list[int]:
    """Return the finished chunks that the next one attends to, in order. cuts: whether each chunk opened a shot."""
    window = ChunkWindow(spec)
    for cut in cuts:
        window.begin()
        window.commit(cut=cut)
    window.begin()
    return sorted(chunk for chunk in window.chunks if chunk != window.next_chunk)


def visible_chunks(spec: ChunkSpec, cuts: list[bool]) -> Tensor:
    """Return whether chunk i attends to chunk j in a rollout with these cuts, bool [num_chunks, num_chunks]."""
    window = ChunkWindow(spec)
    visible = torch.zeros(len(cuts), len(cuts), dtype=torch.bool)
    for index, cut in enumerate(cuts):
        window.begin()
        visible[index, window.chunks] = True
        window.commit(cut=cut)
    return visible


class ChunkCache:
    """Keys and values of the chunks already made, for a model that is run layer by layer, under autograd or not.

    It joins the window, which decides which chunk is in which slot, to the slots that store them. Keys of the live
    chunk are given before rotation. `attended` may be called any number of times a chunk, `keep` once a layer, in the
    clean pass; `commit` ends the chunk. Samples of a batch share their cuts, and so their slots and positions.
    """

    slots_type: type[Slots] = PlainSlots

    def __init__(self, sizes: CacheSizes) -> None:
        self.spec = sizes.spec
        self.window = ChunkWindow(sizes.spec)
        self._slots = self.slots_type(sizes)
        self._has_begun = False

    def attended(self, layer: int, keys_BLNK: Tensor, values_BLNK: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Return rotated keys and values of all slots in use, [B, S * L, N, K], with those of the live chunk.

        They are valid until the next call, for any layer.
        """
        keys_BSLNK, values_BSLNK = layer_slots = self._opened(layer)
        self._write_live_slot(layer_slots, rotate(keys_BLNK, rope), values_BLNK)
        end = self.window.num_slots
        return keys_BSLNK[:, :end].flatten(1, 2), values_BSLNK[:, :end].flatten(1, 2)

    def past(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return copies of the rotated keys and values of the past, detached, for use under autograd."""
        with torch.no_grad():
            keys_BSLNK, values_BSLNK = self._opened(layer)
            slots = self.window.past_slots()
            return keys_BSLNK[:, slots].flatten(1, 2), values_BSLNK[:, slots].flatten(1, 2)

    def keep(self, layer: int, keys_BLNK: Tensor, values_BLNK: Tensor, rope: Rope) -> None:
        """Store the keys and values of the finished live chunk, to which later chunks attend."""
        live = self._begin()
        self._write_live_slot(self._slots.open(layer, 0), rotate(keys_BLNK, rope), values_BLNK)
        if not self._slots.copies:
            return
        if layer == 0:
            assert rope.cos.shape[0] == 1, "samples of a batch share their positions, as they share the slots"
            self._slots.set_rotation(live, rope.cos[0, :, 0], rope.sin[0, :, 0])
        self._slots.keep(layer, keys_BLNK, values_BLNK)

    def commit(self, *, cut: bool = False) -> None:
        """Make the live chunk part of the past, after the clean pass. cut: whether it opened a shot."""
        self.window.commit(cut=cut)
        self._has_begun = False

    @property
    def num_bytes(self) -> int:
        """Bytes that grow with layers and slots, without what all layers share."""
        return self._slots.num_bytes

    def _begin(self) -> int:
        """Give the live chunk its slot, once, and return the slot."""
        live = self.window.begin()
        if not self._has_begun:
            self._slots.begin(self.window.slots())
            self._has_begun = True
        return live

    def _opened(self, layer: int) -> tuple[Tensor, Tensor]:
        self._begin()
        return self._slots.open(layer, self.window.num_slots - 1)

    def _write_live_slot(self, slots_BSLNK: tuple[Tensor, Tensor], rotated_BLNK: Tensor, values_BLNK: Tensor) -> None:
        keys_BSLNK, values_BSLNK = slots_BSLNK
        live = self._begin()
        keys_BSLNK[:, live] = rotated_BLNK.to(keys_BSLNK.dtype)
        values_BSLNK[:, live] = values_BLNK.to(values_BSLNK.dtype)


class KVCache(ChunkCache):
    """A cache of rotated keys and values in the dtype of the model."""

    slots_type = PlainSlots


class NVFP4KVCache(ChunkCache):
    """A cache in 4 bits."""

    slots_type = NVFP4Slots


class NVFP4MixedKVCache(ChunkCache):
    """A cache in 4 bits that reads the sink and the newest finished chunk as they were written."""

    slots_type = NVFP4MixedSlots


CACHES: dict[CachePrecision, type[ChunkCache]] = {
    "bf16": KVCache,
    "nvfp4": NVFP4KVCache,
    "nvfp4-mixed": NVFP4MixedKVCache,
}
"""Class of the cache of each format; "bf16" is the dtype of the model."""
