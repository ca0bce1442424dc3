"""The steps of a video, one for each chunk: from a finished plan, or from prompts that change while the video runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from longvideo.errors import UserError, shown
from longvideo.infer.options import whole_number

if TYPE_CHECKING:
    from longvideo.infer.script import ChunkPlan, ChunkTiming, Script

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

    index: its number in the video. prompts, negative_prompts: those of each sample. cut: whether the chunk starts a new
    scene. num_frames: pixel frames that are kept. recache: whether the clean pass of the past is run again, under the
    prompts of this chunk, before it begins.
    """

    index: int
    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
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


def planned_steps(plan: ChunkPlan, scripts: Sequence[Script], *, first: int = 0) -> Iterator[Step]:
    """Yield the steps of a plan.

    scripts: that of each sample, whose shots have the lengths of the plan. first: number of the plan's first chunk in
    the video.
    """
    for chunk in plan:
        prompts = tuple(script.shots[chunk.shot].prompt for script in scripts)
        negative_prompts = tuple(script.negative_prompts[chunk.shot] for script in scripts)
        yield Step(first + chunk.index, prompts, negative_prompts, chunk.cut, chunk.num_frames)


@dataclass(frozen=True)
class LiveShot:
    """A shot of a video whose shots change while it runs. mode: how it replaces the shot before."""

    prompt: str
    mode: SwitchMode = "cut"
    negative_prompt: str = ""


Shots = dict[int, LiveShot]
"""The shots of a video by the number of their first chunk. There is always one at chunk 0."""


def shot_at(shots: Shots, chunk: int) -> LiveShot:
    """Return the shot that a chunk belongs to."""
    return shots[max(first for first in shots if first <= chunk)]


class LiveSteps(Iterator[Step]):
    """The steps of a video whose shots change while it runs.

    One thread iterates; every other method may be called from any thread.
    """

    def __init__(
        self,
        shots: Shots,
        timing: ChunkTiming,
        *,
        check: Callable[[LiveShot], None],
        num_frames: int | None = None,
        first: int = 0,
    ) -> None:
        """Start at a chunk of a video.

        check: raises PromptError for a shot whose texts cannot be used. num_frames: pixel frames of the whole video;
        None means that it has no end. first: number of the first chunk.
        """
        for shot in shots.values():
            check(shot)
        self._shots, self._timing, self._num_frames, self._next = dict(shots), timing, num_frames, first
        self._check = check
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

    def add_shot(
        self, prompt: str, mode: SwitchMode, *, negative_prompt: str | None = None, chunk: int | None = None
    ) -> Receipt:
        """Show another prompt from a chunk.

        negative_prompt: None keeps that of the shot before. chunk: None means the next one that begins.
        Raises PromptError for texts that cannot be used, and UserError for a chunk that has begun or that is after the
        end of the video, and for other wrong values.
        """
        if chunk is not None:
            chunk = whole_number(chunk, "chunk", 0, MAX_CHUNK)
        with self._changed:
            first = self._next if chunk is None else chunk
            if first < self._next:
                raise UserError(f"chunk {first} has already begun; use {self._next} or a later one")
            if not isinstance(mode, str) or mode not in MODES:
                raise UserError(f"mode is {shown(mode)}; expected one of {', '.join(MODES)}")
            if negative_prompt is None:
                negative_prompt = shot_at(self._shots, first).negative_prompt
            self._check(LiveShot(prompt, mode, negative_prompt))
            if self._num_frames is not None and self._timing.start(first) >= self._num_frames:
                last = self._timing.chunks_for(self._num_frames) - 1
                raise UserError(f"the video ends before chunk {first}; use {last}, its last one, or an earlier one")
            if first in self._shots:
                mode = MODES[max(MODES.index(mode), MODES.index(self._shots[first].mode))]
            self._shots[first] = LiveShot(prompt, mode, negative_prompt)
            return Receipt(accepted_at=max(0, self._next - 1), effective_at=first)

    def branch(self, shots: Shots, *, first: int) -> LiveSteps:
        """Return steps of the same video with other shots, from a chunk on."""
        return LiveSteps(shots, self._timing, check=self._check, num_frames=self._num_frames, first=first)

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
            shot, begins = shot_at(self._shots, index), index in self._shots and index > 0
            return Step(
                index,
                (shot.prompt,),
                (shot.negative_prompt,),
                cut=begins and shot.mode == "cut",
                num_frames=end - start,
                recache=begins and shot.mode == "recache",
            )

    def _set(self, *, paused: bool) -> None:
        with self._changed:
            self._paused = paused
            self._changed.notify_all()
