"""Keys and values of the chunks already made: storage that never moves, and the rule of who stays.

The rule is host arithmetic on integers. When the window is full the oldest chunk goes that is neither sink nor the
pinned first chunk of the current shot; the next chunk is written into its slot. Attention without a mask does not care
about the order of keys, so slots are attended to where they lie.
"""

from __future__ import annotations

import torch
from torch import Tensor

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

    @property
    def num_slots(self) -> int:
        """Slots in use, the live one included; they are always the first ones."""
        return len(self.chunks)


def visible_chunks(spec: ChunkSpec, cuts: list[bool]) -> Tensor:
    """Return bool [num_chunks, num_chunks]: whether chunk i attends to chunk j in a rollout with these cuts."""
    window = ChunkWindow(spec)
    visible = torch.zeros(len(cuts), len(cuts), dtype=torch.bool)
    for index, cut in enumerate(cuts):
        window.begin()
        visible[index, window.chunks] = True
        window.commit(cut=cut)
    return visible


class KVCache:
    """Rotated keys and values of every layer, `[B, slots * tokens_per_chunk, N, K]`, allocated once.

    Samples of one batch share their cuts, since they share the slots.
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

    def store(self, layer: int, keys_BLNK: Tensor, values_BLNK: Tensor) -> None:
        """Write the live chunk's rotated keys and its values into its slot."""
        live = self._span(self.window.begin())
        self._keys[layer][:, live] = keys_BLNK.to(self._keys[layer].dtype)
        self._values[layer][:, live] = values_BLNK.to(self._values[layer].dtype)

    def attended(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of all slots in use, the live one included, without a copy."""
        end = self.window.num_slots * self.spec.tokens_per_chunk
        return self._keys[layer][:, :end], self._values[layer][:, :end]

    def past(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return copies of keys and values of the committed slots only, detached, for use under autograd."""
        live = self.window.begin()
        slots = [slot for slot in range(self.window.num_slots) if slot != live]
        shape = (self.spec.window_chunks, self.spec.tokens_per_chunk)
        keys, values = (
            stored[layer].unflatten(1, shape)[:, slots].flatten(1, 2).detach() for stored in (self._keys, self._values)
        )
        return keys, values

    def commit(self, *, cut: bool = False) -> None:
        """Make the live chunk, filled by the clean pass, part of the past."""
        self.window.commit(cut=cut)

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self._keys, *self._values))

    def _span(self, slot: int) -> slice:
        return slice(slot * self.spec.tokens_per_chunk, (slot + 1) * self.spec.tokens_per_chunk)
