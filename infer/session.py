"""A video that is steered while it is being made: other prompts, planned shots, a pause, the way back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from longvideo.infer.generation import GeneratedChunk
from longvideo.infer.options import check_path, whole_number
from longvideo.infer.snapshot import SessionOptions, Snapshot, write_snapshot
from longvideo.infer.timeline import MAX_CHUNK, LiveSteps, Receipt, Shots, SwitchMode

if TYPE_CHECKING:
    from types import TracebackType

    from longvideo.infer.history import History, Past
    from longvideo.infer.script import ChunkTiming


class Session(Iterator[GeneratedChunk]):
    """Iterate over chunks, which have the frames, their step (number, prompt in force) and the time they took.

    One thread iterates; every other method may be called at any time, from any thread. Close it (or use it as a context
    manager) to stop the work that runs ahead.
    """

    def __init__(
        self,
        shots: Shots,
        options: SessionOptions,
        history: History,
        *,
        timing: ChunkTiming,
        generate: Callable[[LiveSteps, Past | None], Generator[GeneratedChunk, None, None]],
        check_words: Callable[[str], None],
    ) -> None:
        """history: what to go on behind; empty for a new video. generate: makes the chunks of steps.

        check_words: warns of words that the model does not know.
        """
        self.timing, self.options = timing, options
        self._history, self._generate, self._check_words = history, generate, check_words
        # _turn is held while a chunk is waited for, _lock never for long
        self._turn, self._lock = threading.Lock(), threading.Lock()
        self._steps = self._new_steps(shots, first=len(history))
        self._past = history.behind(len(history))
        self._chunks: Generator[GeneratedChunk, None, None] | None = None
        self._is_behind = self._is_closed = False

    @property
    def next_chunk(self) -> int:
        """The chunk that comes next out of the iterator."""
        with self._lock:
            return len(self._history)

    @property
    def shots(self) -> Shots:
        """Prompts and how they come in, by the chunk that they begin with: those that are over, and those planned."""
        with self._lock:
            return self._steps.shots

    @property
    def is_paused(self) -> bool:
        with self._lock:
            return self._steps.is_paused

    def set_prompt(self, prompt: str, mode: SwitchMode = "cut") -> Receipt:
        """Show another prompt from the next chunk that is begun; chunks already begun keep theirs.

        mode: "cut" starts a new shot; "keep" goes on with the scene under the new text; "recache" does so too, and runs
        the past that is attended to through the clean pass again, under the new text.
        """
        with self._lock:
            receipt = self._steps.set_prompt(prompt, mode)
        self._check_words(prompt)
        return receipt

    def add_shot(self, prompt: str, *, chunk: int, mode: SwitchMode = "cut") -> Receipt:
        """Show another prompt from a later chunk; raises UserError if that is begun already, or behind the end."""
        with self._lock:
            receipt = self._steps.add_shot(prompt, chunk, mode)
        self._check_words(prompt)
        return receipt

    def pause(self) -> None:
        """Begin no chunk until `resume`; iterating waits as long."""
        with self._lock:
            self._steps.pause()

    def resume(self) -> None:
        """Go on after `pause`."""
        with self._lock:
            self._steps.resume()

    def seek(self, chunk: int, *, prompt: str | None = None, mode: SwitchMode = "cut") -> Receipt:
        """Go back: `chunk` comes next out of the iterator, made anew, and what came after it is forgotten.

        With a prompt it begins another branch there, without it is made as it was; shots planned and not yet begun
        stay. What it looks back at goes through the clean pass again, so that behind a window that has moved on it is
        nearly, not exactly, what it was.
        Raises UserError for a chunk not made yet, or so far back that what it needs is no longer kept.
        """
        chunk = whole_number(chunk, "chunk", 0, MAX_CHUNK)
        with self._lock:
            past, begun = self._history.behind(chunk), self._steps.next_chunk
            shots = {first: shot for first, shot in self._steps.shots.items() if first <= chunk or first >= begun}
            if prompt is not None:
                if chunk > 0:
                    shots.pop(chunk, None)
                else:
                    shots[0] = (prompt, "keep")
            steps = self._new_steps(shots, first=chunk)
            receipt = Receipt(max(0, begun - 1), chunk)
            if prompt is not None:
                steps.set_prompt(prompt, mode)
            if self._steps.is_paused:
                steps.pause()
            self._history.truncate(chunk)
            self._steps.close()
            self._steps, self._past, self._is_behind = steps, past, True
        if prompt is not None:
            self._check_words(prompt)
        return receipt

    def snapshot(self, path: str | Path) -> None:
        """Write what it takes to go on behind the last chunk that was handed out; see `StreamingPipeline.restore`."""
        check_path(path, "the snapshot")
        with self._lock:
            snapshot = Snapshot(self.options, self._steps.shots, self._history.steps, self._history.kept)
        write_snapshot(snapshot, Path(path))

    def __next__(self) -> GeneratedChunk:
        with self._turn:
            while True:
                with self._lock:
                    leave = self._is_behind or self._is_closed
                    steps, past, self._is_behind = self._steps, self._past, False
                if leave and self._chunks is not None:
                    self._chunks.close()
                    self._chunks = None
                if self._is_closed:
                    raise StopIteration
                if self._chunks is None:
                    self._chunks = self._generate(steps, past)
                chunk = next(self._chunks, None)
                with self._lock:
                    if self._is_behind:  # it belongs to what was left meanwhile
                        continue
                    if chunk is None:
                        raise StopIteration
                    if chunk.is_complete:
                        self._history.add(chunk.record)
                return chunk

    def close(self) -> None:
        """Stop making chunks; a thread that waits for one gets it first. Closing twice does nothing."""
        with self._lock:
            self._is_closed = True
            self._steps.close()
        with self._turn:
            if self._chunks is not None:
                self._chunks.close()
                self._chunks = None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _new_steps(self, shots: Shots, *, first: int) -> LiveSteps:
        return LiveSteps(shots, self.timing, num_frames=self.options.num_frames, first=first)
