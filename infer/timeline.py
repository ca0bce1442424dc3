"""The steps of a video, one for each chunk: from a finished plan, or from prompts that change while the video runs."""

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
"""How a prompt replaces the one before.

"cut" starts a new shot. "keep" continues the scene under the new text. "recache" does so as well, and first runs the
clean pass of the past again under the new text.
"""
MODES: tuple[SwitchMode, ...] = ("keep", "recache", "cut")
"""All modes. If several are requested for one chunk, the last one in this list is used."""


@dataclass(frozen=True)
class Step:
    """A chunk to generate.

    index: its number in the video. prompts: the prompt of each sample. cut: whether the chunk starts a new scene.
    num_frames: pixel frames that are kept. recache: whether the clean pass of the past is run again, under the prompts
    of this chunk, before it begins.
    """

    index: int
    prompts: tuple[str, ...]
    cut: bool
    num_frames: int
    recache: bool = False


@dataclass(frozen=True)
class Receipt:
    """When a change of a running video takes effect.

    accepted_at: the chunk that was being generated when the change was requested. effective_at: the first chunk that
    shows the change.
    """

    accepted_at: int
    effective_at: int


def planned_steps(plan: ChunkPlan, prompts: Sequence[Sequence[str]], *, first: int = 0) -> Iterator[Step]:
    """Yield the steps of a plan.

    prompts: the prompts of each sample, one for each shot. first: number of the plan's first chunk in the video.
    """
    for chunk in plan:
        yield Step(first + chunk.index, tuple(shots[chunk.shot] for shots in prompts), chunk.cut, chunk.num_frames)


Shots = dict[int, tuple[str, SwitchMode]]
"""The prompt and the mode of each shot, by the number of its first chunk. There is always a shot at chunk 0."""


class LiveSteps(Iterator[Step]):
    """The steps of a video whose shots change while it runs.

    One thread iterates; every other method may be called from any thread.
    """

    def __init__(self, shots: Shots, timing: ChunkTiming, *, num_frames: int | None = None, first: int = 0) -> None:
        """Start at a chunk of a video.

        num_frames: pixel frames of the whole video; None means that it has no end. first: number of the first chunk.
        """
        for prompt, _ in shots.values():
            check_prompt(prompt, "the prompt")
        self._shots, self._timing, self._num_frames, self._next = dict(shots), timing, num_frames, first
        self._paused = self._closed = False
        self._changed = threading.Condition()

    @property
    def next_chunk(self) -> int:
        """Number of the chunk that begins next."""
        with self._changed:
            return self._next

    @property
    def shots(self) -> Shots:
        """All shots: past, present and planned ones."""
        with self._changed:
            return dict(self._shots)

    @property
    def is_paused(self) -> bool:
        """Whether no chunk begins until `resume`."""
        with self._changed:
            return self._paused

    def add_shot(self, prompt: str, mode: SwitchMode, *, chunk: int | None = None) -> Receipt:
        """Show another prompt from a chunk; None means the next one that begins.

        Raises UserError for a chunk that has begun or that is after the end of the video, and for other wrong values.
        """
        if chunk is not None:
            chunk = whole_number(chunk, "chunk", 0, MAX_CHUNK)
        with self._changed:
            first = self._next if chunk is None else chunk
            if first < self._next:
                raise UserError(f"chunk {first} has already begun; use {self._next} or a later one")
            check_prompt(prompt, "the prompt")
            if not isinstance(mode, str) or mode not in MODES:
                raise UserError(f"mode is {shown(mode)}; expected one of {', '.join(MODES)}")
            if self._num_frames is not None and self._timing.start(first) >= self._num_frames:
                last = self._timing.chunks_for(self._num_frames) - 1
                raise UserError(f"the video ends before chunk {first}; use {last}, its last one, or an earlier one")
            if first in self._shots:
                mode = MODES[max(MODES.index(mode), MODES.index(self._shots[first][1]))]
            self._shots[first] = (prompt, mode)
            return Receipt(accepted_at=max(0, self._next - 1), effective_at=first)

    def branch(self, shots: Shots, *, first: int) -> LiveSteps:
        """Return steps of the same video with other shots, from a chunk on."""
        return LiveSteps(shots, self._timing, num_frames=self._num_frames, first=first)

    def pause(self) -> None:
        """Begin no chunk until `resume` or `close`."""
        self._set(paused=True)

    def resume(self) -> None:
        """Begin chunks again after `pause`."""
        self._set(paused=False)

    def close(self) -> None:
        """End the video: no other chunk begins."""
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
