"""Keys and values of the chunks already made: storage that never moves, and the rule of who stays.

The rule is host arithmetic on integers. When the window is full the oldest chunk goes that is neither sink nor the
pinned first chunk of the current shot; the next chunk is written into its slot. Attention without a mask does not care
about the order of keys, so slots are attended to where they lie.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from longvideo.model.rope import Rope, rotate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longvideo.model.spec import ChunkSpec


class ChunkWindow:
    """Which chunk occupies which slot. `begin` gives the live chunk a slot, `commit` makes it part of the past."""

    def __init__(self, spec: ChunkSpec):
        self.spec = spec
        self.chunks: list[int] = []
        self.next_chunk = 0
        self.live_slot: int | None = None
        self._pin: int | None = None

    def begin(self) -> int:
        """Return the slot of the next chunk, evicting one if all are taken. Repeated calls return the same slot."""
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
        """Keep the live chunk. cut: it opened a shot, so it is pinned from now on in place of the last pin."""
        assert self.live_slot is not None, "commit without begin"
        if cut and self.spec.pin_shots and self.next_chunk > 0:
            self._pin = self.next_chunk
        self.next_chunk += 1
        self.live_slot = None

    def skip_to(self, chunk: int) -> None:
        """Go on with a later chunk; those between are not kept."""
        is_open = self.live_slot is not None
        assert chunk == self.next_chunk or (chunk > self.next_chunk and not is_open), (chunk, self.next_chunk)
        self.next_chunk = chunk

    def past_slots(self) -> list[int]:
        """Return the slots that the live chunk may look back at."""
        live = self.begin()
        return [slot for slot in range(self.num_slots) if slot != live]

    @property
    def num_slots(self) -> int:
        """Slots in use, the live one included; they are always the first ones."""
        return len(self.chunks)


def past_chunks(spec: ChunkSpec, cuts: Sequence[bool]) -> list[int]:
    """Return which of the chunks made so far the next one attends to, in order. cuts: whether each opened a shot."""
    window = ChunkWindow(spec)
    for cut in cuts:
        window.begin()
        window.commit(cut=cut)
    window.begin()
    return sorted(chunk for chunk in window.chunks if chunk != window.next_chunk)


def visible_chunks(spec: ChunkSpec, cuts: list[bool]) -> Tensor:
    """Return bool [num_chunks, num_chunks]: whether chunk i attends to chunk j in a rollout with these cuts."""
    window = ChunkWindow(spec)
    visible = torch.zeros(len(cuts), len(cuts), dtype=torch.bool)
    for index, cut in enumerate(cuts):
        window.begin()
        visible[index, window.chunks] = True
        window.commit(cut=cut)
    return visible


class ChunkCache(Protocol):
    """What a rollout keeps of the chunks already made. Samples of one batch share their cuts and so their slots.

    The live chunk's keys come before rotation. `attended` may be called any number of times a chunk, `keep` once a
    layer, in the clean pass; `commit` ends the chunk.
    """

    window: ChunkWindow

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
    ) -> None: ...

    def attended(self, layer: int, keys_BLNK: Tensor, values_BLNK: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Return rotated keys and values of all slots in use, [B, S * L, N, K], the live chunk's among them.

        They are valid until the next call, for whatever layer.
        """
        ...

    def past(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return copies of rotated keys and values of the kept slots only, detached, for use under autograd."""
        ...

    def keep(self, layer: int, keys_BLNK: Tensor, values_BLNK: Tensor, rope: Rope) -> None:
        """Make these keys and values what is attended to once the live chunk is part of the past."""
        ...

    def commit(self, *, cut: bool = False) -> None:
        """Make the live chunk, which the clean pass has kept, part of the past."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes that grow with layers and slots; not what all layers share."""
        ...


class KVCache:
    """Rotated keys and values of every layer, `[B, slots * tokens_per_chunk, N, K]`, allocated once. See `ChunkCache`.

    The live chunk is written into its slot, and all slots are attended to where they lie, without a copy.
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
        shape = (batch, spec.window_chunks * spec.tokens_per_chunk, num_heads, head_dim)
        self._keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self._values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]

    def attended(self, layer: int, keys_BLNK: Tensor, values_BLNK: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        self._write(layer, keys_BLNK, values_BLNK, rope)
        end = self.window.num_slots * self.spec.tokens_per_chunk
        return self._keys[layer][:, :end], self._values[layer][:, :end]

    def past(self, layer: int) -> tuple[Tensor, Tensor]:
        shape = (self.spec.window_chunks, self.spec.tokens_per_chunk)
        slots = self.window.past_slots()
        keys, values = (
            stored[layer].unflatten(1, shape)[:, slots].flatten(1, 2).detach() for stored in (self._keys, self._values)
        )
        return keys, values

    def keep(self, layer: int, keys_BLNK: Tensor, values_BLNK: Tensor, rope: Rope) -> None:
        self._write(layer, keys_BLNK, values_BLNK, rope)

    def _write(self, layer: int, keys_BLNK: Tensor, values_BLNK: Tensor, rope: Rope) -> None:
        start = self.window.begin() * self.spec.tokens_per_chunk
        live = slice(start, start + self.spec.tokens_per_chunk)
        self._keys[layer][:, live] = rotate(keys_BLNK, rope).to(self._keys[layer].dtype)
        self._values[layer][:, live] = values_BLNK.to(self._values[layer].dtype)

    def commit(self, *, cut: bool = False) -> None:
        self.window.commit(cut=cut)

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self._keys, *self._values))
