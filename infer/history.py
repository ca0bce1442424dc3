"""The chunks of a video so far, with what it takes to go on behind any of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.errors import UserError
from longvideo.infer.timeline import Step
from longvideo.model.cache import ChunkWindow, past_chunks

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from longvideo.model.spec import ChunkSpec

HISTORY_CHUNKS = 64
"""Whose latents are kept: 85 s to go back, 11 MB of `tiny`, 350 MB of 704 x 1280."""


@dataclass(frozen=True)
class ChunkRecord:
    """A chunk that was made. latents: [B, C, T, H, W], float32, in host memory; noise: states of the generators of its
    samples before it was begun."""

    step: Step
    latents: Tensor
    noise: tuple[Tensor, ...]


@dataclass(frozen=True)
class PastStep:
    """A chunk that the next one attends to, the `shot`-th cut behind it or at it, and the prompts it is seen under.

    announces: whether its text says that it opens a shot, as it no longer does when it is seen under another prompt.
    """

    index: int
    shot: int
    cut: bool
    prompts: tuple[str, ...]
    announces: bool
    latents: Tensor


@dataclass(frozen=True)
class Past:
    """What it takes to go on behind a chunk: what is attended to, the latents that the decoder remembers (of whole
    chunks, from the start of the video or not), and the noise to come."""

    attended: tuple[PastStep, ...]
    decoded: tuple[Tensor, ...]
    is_decoded_from_start: bool
    generators: tuple[torch.Generator, ...]


class History:
    """Chunks in their order. The latents of the last `capacity` are kept, and of those that are still attended to."""

    def __init__(
        self,
        spec: ChunkSpec,
        *,
        decode_lookback: int,
        capacity: int,
        steps: Sequence[Step] = (),
        kept: Iterable[ChunkRecord] = (),
    ) -> None:
        """decode_lookback: latents before its own that a frame depends on; see `longvideo.vae.halo`. capacity: how many
        of the latest chunks are kept, beside those that the next one attends to; at least what the next one needs.

        steps, kept: of a history to go on with.
        """
        self._spec = spec
        self._lookback = -(-decode_lookback // spec.chunk_frames)
        # the next chunk needs the noise of the last one, and the latents that the decoder looks back at
        self._capacity = max(capacity, self._lookback, 1)
        self._steps = list(steps)
        self._kept = {record.step.index: record for record in kept}
        self._window = self._replayed()

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def steps(self) -> list[Step]:
        """The steps of all chunks."""
        return list(self._steps)

    @property
    def kept(self) -> list[ChunkRecord]:
        """The records that are still there."""
        return list(self._kept.values())

    def add(self, record: ChunkRecord) -> None:
        """Add the next chunk."""
        index = record.step.index
        assert index == len(self), (index, len(self))
        self._steps.append(record.step)
        self._kept[index] = record
        self._window.begin()
        self._window.commit(cut=record.step.cut)
        for old in [old for old in self._kept if old <= index - self._capacity and old not in self._window.chunks]:
            del self._kept[old]

    def truncate(self, chunk: int) -> None:
        """Forget a chunk and those behind it."""
        del self._steps[chunk:]
        self._kept = {index: record for index, record in self._kept.items() if index < chunk}
        self._window = self._replayed()

    def behind(self, chunk: int) -> Past | None:
        """Return what it takes to make a chunk (again); None for the first. Raises UserError if that is gone."""
        if not 0 <= chunk <= len(self):
            raise UserError(f"chunk {chunk} is not made yet; the last one is {len(self) - 1}")
        if chunk == 0:
            return None
        attended, decoded = self._attended(chunk), range(max(0, chunk - self._lookback), chunk)
        if any(index not in self._kept for index in (*attended, *decoded)):
            raise UserError(f"chunk {chunk} is too far back: what was before it is no longer kept")
        texts, shots = self._texts(chunk), self._shots(chunk)
        return Past(
            attended=tuple(
                PastStep(index, shots[index], self._steps[index].cut, *texts[index], self._kept[index].latents)
                for index in attended
            ),
            decoded=tuple(self._kept[index].latents for index in decoded),
            is_decoded_from_start=decoded[0] == 0,
            generators=tuple(_behind(state, self._kept[chunk - 1].latents) for state in self._kept[chunk - 1].noise),
        )

    def _replayed(self) -> ChunkWindow:
        window = ChunkWindow(self._spec)
        for step in self._steps:
            window.begin()
            window.commit(cut=step.cut)
        return window

    def _attended(self, chunk: int) -> list[int]:
        return past_chunks(self._spec, [step.cut for step in self._steps[:chunk]])

    def _texts(self, chunk: int) -> list[tuple[tuple[str, ...], bool]]:
        """Return the prompts under which each chunk is seen, its own or those of the last one that rewrote it, and
        whether its text says that it opens a shot."""
        texts: list[tuple[tuple[str, ...], bool]] = []
        for step in self._steps[:chunk]:
            if step.recache:
                texts = [(step.prompts, False)] * len(texts)
            texts.append((step.prompts, step.cut))
        return texts

    def _shots(self, chunk: int) -> list[int]:
        shots, shot = [], 0
        for step in self._steps[:chunk]:
            shot += step.cut
            shots.append(shot)
        return shots


def _behind(state: Tensor, latents: Tensor) -> torch.Generator:
    """Return a generator that has made the noise of a chunk since it was in `state`."""
    generator = torch.Generator()
    generator.set_state(state)
    torch.randn(latents.shape[1:], generator=generator)
    return generator
