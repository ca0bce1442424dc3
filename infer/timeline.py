"""What is made next: one step a chunk, from a finished plan or from prompts that change while the video runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from longvideo.errors import UserError
from longvideo.infer.options import shown, whole_number
from longvideo.infer.script import ChunkPlan, ChunkTiming, check_prompt

MAX_CHUNK = 2**31
SwitchMode = Literal["keep", "recache", "cut"]
MODES: tuple[SwitchMode, ...] = ("keep", "recache", "cut")
"""Of two asked for at one chunk, the later in this list stays."""


@dataclass(frozen=True)
class Step:
    """A chunk to be made: the prompt of every sample, whether it opens a scene, and how many frames are kept.

    recache: before it is begun, the past is run through the clean pass again, under its prompt.
    """

    index: int
    prompts: tuple[str, ...]
    cut: bool
    num_frames: int
    recache: bool = False


@dataclass(frozen=True)
class Receipt:
    """accepted_at: the chunk that was being made when a change was asked for; effective_at: the first that shows it."""

    accepted_at: int
    effective_at: int


def planned_steps(plan: ChunkPlan, prompts: Sequence[Sequence[str]]) -> Iterator[Step]:
    """Follow a plan; `prompts[sample][shot]`."""
    for chunk in plan:
        yield Step(chunk.index, tuple(shots[chunk.shot] for shots in prompts), chunk.cut, chunk.num_frames)


Shots = dict[int, tuple[str, SwitchMode]]
"""Prompts and how they come in, by the chunk that they begin with; chunk 0 has one."""


class LiveSteps(Iterator[Step]):
    """Follow shots that may be added while the video runs. Safe to be read in one thread and steered in others."""

    def __init__(self, shots: Shots, timing: ChunkTiming, *, num_frames: int | None = None, first: int = 0) -> None:
        """num_frames: of the whole video; None for no end. first: the chunk to begin with."""
        for prompt, _ in shots.values():
            check_prompt(prompt, "the prompt")
        self._shots, self._timing, self._num_frames, self._next = dict(shots), timing, num_frames, first
        self._paused = self._closed = False
        self._changed = threading.Condition()

    @property
    def next_chunk(self) -> int:
        """The chunk that is begun next."""
        with self._changed:
            return self._next

    @property
    def shots(self) -> Shots:
        """All shots, those that are over too."""
        with self._changed:
            return dict(self._shots)

    @property
    def is_paused(self) -> bool:
        with self._changed:
            return self._paused

    def set_prompt(self, prompt: str, mode: SwitchMode) -> Receipt:
        """Show another prompt from the next chunk that is begun."""
        with self._changed:
            return self._plan(prompt, self._next, mode)

    def add_shot(self, prompt: str, chunk: int, mode: SwitchMode) -> Receipt:
        """Show another prompt from a chunk that is not yet begun; raises UserError for another."""
        chunk = whole_number(chunk, "chunk", 0, MAX_CHUNK)
        with self._changed:
            if chunk < self._next:
                raise UserError(f"chunk {chunk} is begun already; the next one is {self._next}")
            return self._plan(prompt, chunk, mode)

    def pause(self) -> None:
        """Begin no chunk until `resume` or `close`."""
        self._set(paused=True)

    def resume(self) -> None:
        """Go on after `pause`."""
        self._set(paused=False)

    def close(self) -> None:
        """End: no chunk is begun any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __next__(self) -> Step:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._paused)
            index = self._next
            start, end = self._timing.start(index), self._timing.start(index + 1)
            if self._num_frames is not None:
                end = min(end, self._num_frames)
            if self._closed or end <= start:
                raise StopIteration
            self._next = index + 1
            shot = max(chunk for chunk in self._shots if chunk <= index)
            prompt, mode = self._shots[shot]
            begins = shot == index and index > 0
            return Step(
                index,
                (prompt,),
                cut=begins and mode == "cut",
                num_frames=end - start,
                recache=begins and mode == "recache",
            )

    def _set(self, *, paused: bool) -> None:
        with self._changed:
            self._paused = paused
            self._changed.notify_all()

    def _plan(self, prompt: str, chunk: int, mode: SwitchMode) -> Receipt:
        check_prompt(prompt, "the prompt")
        if not isinstance(mode, str) or mode not in MODES:
            raise UserError(f"mode is {shown(mode)}; use one of {', '.join(MODES)}")
        if self._num_frames is not None and self._timing.start(chunk) >= self._num_frames:
            raise UserError(
                f"the video ends before chunk {chunk}; its last one is {self._timing.chunks_for(self._num_frames) - 1}"
            )
        if chunk in self._shots:
            mode = MODES[max(MODES.index(mode), MODES.index(self._shots[chunk][1]))]
        self._shots[chunk] = (prompt, mode)
        return Receipt(accepted_at=max(0, self._next - 1), effective_at=chunk)
