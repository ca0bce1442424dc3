"""The chunks of a video so far, and everything that is needed to continue it after any of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.errors import UserError
from longvideo.infer.timeline import Step
from longvideo.model.cache import ChunkWindow, past_chunks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longvideo.infer.script import ChunkTiming
    from longvideo.infer.timeline import LiveShot
    from longvideo.model.spec import ChunkSpec

HISTORY_CHUNKS = 64
"""Default number of chunks whose latents are stored for seeking: 85 s, 11 MB for `tiny`, 350 MB at 704 x 1280."""


@dataclass(frozen=True)
class ChunkRecord:
    """A finished chunk.

    latents: [B, C, T, H, W], float32, in host memory. noise: state of each sample's generator before the chunk began.
    """

    step: Step
    latents: Tensor
    noise: tuple[Tensor, ...]


@dataclass(frozen=True)
class PastStep:
    """A chunk that the next one attends to.

    index: its number in the video. shot: number of cuts up to and including this chunk. cut: whether it starts a shot.
    prompts, negative_prompts: those of its latest clean pass. announces: whether the prompts of that clean pass have
    the words that announce a cut; after a recache they have not. latents: [B, C, T, H, W].
    """

    index: int
    shot: int
    cut: bool
    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    announces: bool
    latents: Tensor


@dataclass(frozen=True)
class Past:
    """Everything that is needed to continue a video after a chunk.

    context: chunks that the next one attends to. decoder_latents: latents of chunks on which the decoder's state
    depends. from_start: whether these are all chunks of the video so far. generators: source of the next noise.
    """

    context: tuple[PastStep, ...]
    decoder_latents: tuple[Tensor, ...]
    from_start: bool
    generators: tuple[torch.Generator, ...]


class History:
    """The finished chunks of a video, in order. Latents are stored of the latest chunks and of those in the window."""

    def __init__(
        self,
        spec: ChunkSpec,
        *,
        decode_lookback: int,
        capacity: int,
        steps: Sequence[Step] | None = None,
        records: Sequence[ChunkRecord] = (),
    ) -> None:
        """Start a history, or restore one.

        decode_lookback: number of earlier latent frames that a decoded frame depends on; see `longvideo.vae.halo`.
        capacity: number of the latest chunks whose latents are stored; more are stored if the next chunk needs them.
        steps, records: steps of all chunks and records of the stored ones, of a history to restore. Without steps,
        every chunk has a record.
        """
        self._spec = spec
        self._lookback = -(-decode_lookback // spec.chunk_frames)
        # the next chunk needs the noise of the last one, and the latents that the decoder depends on
        self._capacity = max(capacity, self._lookback, 1)
        self._steps = [record.step for record in records] if steps is None else list(steps)
        self._records = {record.step.index: record for record in records}
        self._window = self._replayed()

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def steps(self) -> list[Step]:
        """The steps of all chunks."""
        return list(self._steps)

    @property
    def records(self) -> list[ChunkRecord]:
        """The records of the stored chunks."""
        return list(self._records.values())

    def add(self, record: ChunkRecord) -> None:
        """Add the next chunk, and delete the latents that are no longer needed."""
        index = record.step.index
        assert index == len(self), (index, len(self))
        self._steps.append(record.step)
        self._records[index] = record
        self._window.begin()
        self._window.commit(cut=record.step.cut)
        for old in [old for old in self._records if old <= index - self._capacity and old not in self._window.chunks]:
            del self._records[old]

    def truncate(self, chunk: int) -> None:
        """Delete a chunk and all later ones."""
        del self._steps[chunk:]
        self._records = {index: record for index, record in self._records.items() if index < chunk}
        self._window = self._replayed()

    def past_of(self, chunk: int) -> Past | None:
        """Return everything that is needed to generate a chunk, for the first or another time; None for chunk 0.

        Raises UserError for a chunk after the next one, and where latents that it needs are no longer stored.
        """
        if not 0 <= chunk <= len(self):
            raise UserError(f"chunk {chunk} is not generated yet; the last one is {len(self) - 1}")
        if chunk == 0:
            return None
        context, decoder_chunks = self._context(chunk), range(max(0, chunk - self._lookback), chunk)
        if any(index not in self._records for index in (*context, *decoder_chunks)):
            raise UserError(
                f"chunk {chunk} is too far back: the chunks before it are no longer stored; use a later one"
            )
        texts, shots = self._texts(chunk), self._shots(chunk)
        return Past(
            context=tuple(
                PastStep(index, shots[index], self._steps[index].cut, *texts[index], self._records[index].latents)
                for index in context
            ),
            decoder_latents=tuple(self._records[index].latents for index in decoder_chunks),
            from_start=decoder_chunks[0] == 0,
            generators=tuple(
                _advanced(state, self._records[chunk - 1].latents) for state in self._records[chunk - 1].noise
            ),
        )

    def _replayed(self) -> ChunkWindow:
        """Return the window after all chunks."""
        window = ChunkWindow(self._spec)
        for step in self._steps:
            window.begin()
            window.commit(cut=step.cut)
        return window

    def _context(self, chunk: int) -> list[int]:
        return past_chunks(self._spec, [step.cut for step in self._steps[:chunk]])

    def _texts(self, chunk: int) -> list[tuple[tuple[str, ...], tuple[str, ...], bool]]:
        """Return the prompts and negative prompts, and `PastStep.announces`, of each chunk before this one."""
        texts: list[tuple[tuple[str, ...], tuple[str, ...], bool]] = []
        for step in self._steps[:chunk]:
            if step.recache:
                texts = [(step.prompts, step.negative_prompts, False)] * len(texts)
            texts.append((step.prompts, step.negative_prompts, step.cut))
        return texts

    def _shots(self, chunk: int) -> list[int]:
        """Return `PastStep.shot` of each chunk before this one."""
        shots, shot = [], 0
        for step in self._steps[:chunk]:
            shot += step.cut
            shots.append(shot)
        return shots


def footage_records(
    chunks: Sequence[Tensor], shots: Sequence[LiveShot], timing: ChunkTiming, *, generators: Sequence[torch.Generator]
) -> list[ChunkRecord]:
    """Return the records of footage, as if it had been generated as the first chunks of a video or of several.

    chunks: latents, [1, C, T, H, W] each, the same for all videos. shots: that of the clean pass of each video.
    generators: source of each video's noise, from which the noise of these chunks is drawn.
    """
    prompts = tuple(shot.prompt for shot in shots)
    negative_prompts = tuple(shot.negative_prompt for shot in shots)
    records = []
    for index, latents in enumerate(chunks):
        num_frames = timing.start(index + 1) - timing.start(index)
        step = Step(index, prompts, negative_prompts, cut=False, num_frames=num_frames)
        noise = tuple(generator.get_state() for generator in generators)
        records.append(ChunkRecord(step, latents.repeat(len(shots), 1, 1, 1, 1), noise))
        for generator in generators:
            _draw(generator, latents)
    return records


def _advanced(state: Tensor, latents: Tensor) -> torch.Generator:
    """Return a generator that was in a state and has generated the noise of one chunk since."""
    generator = torch.Generator()
    generator.set_state(state)
    _draw(generator, latents)
    return generator


def _draw(generator: torch.Generator, latents: Tensor) -> None:
    """Draw the noise of a chunk with latents [B, C, T, H, W], of one sample."""
    torch.randn(latents.shape[1:], generator=generator)
