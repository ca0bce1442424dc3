"""What is made next: one step a chunk, from a finished plan or from prompts that change while the video runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from longvideo.infer.script import ChunkPlan, ChunkTiming, check_prompt

SwitchMode = Literal["cut", "keep"]


@dataclass(frozen=True)
class Step:
    """A chunk to be made: the prompt of every sample, whether it opens a scene, and how many frames are kept."""

    index: int
    prompts: tuple[str, ...]
    cut: bool
    num_frames: int


def planned_steps(plan: ChunkPlan, prompts: Sequence[Sequence[str]]) -> Iterator[Step]:
    """Follow a plan; `prompts[sample][shot]`."""
    for chunk in plan:
        yield Step(chunk.index, tuple(shots[chunk.shot] for shots in prompts), chunk.cut, chunk.num_frames)


class LiveSteps(Iterator[Step]):
    """Go on with one prompt until another is set. Safe to be read in one thread and set in another."""

    def __init__(self, prompt: str, timing: ChunkTiming) -> None:
        check_prompt(prompt, "the prompt")
        self._prompt = prompt
        self._timing = timing
        self._cut = False
        self._index = 0
        self._lock = threading.Lock()

    def set_prompt(self, prompt: str, mode: SwitchMode) -> int:
        """Show another prompt from the next chunk that is begun; return its index. A pending cut stays pending."""
        check_prompt(prompt, "the prompt")
        with self._lock:
            self._prompt = prompt
            self._cut = self._cut or mode == "cut"
            return self._index

    def __next__(self) -> Step:
        with self._lock:
            index, cut = self._index, self._cut and self._index > 0
            self._index, self._cut = index + 1, False
            num_frames = self._timing.start(index + 1) - self._timing.start(index)
            return Step(index, (self._prompt,), cut, num_frames)
