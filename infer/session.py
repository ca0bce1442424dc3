"""A video that is steered while it runs: new prompts, planned shots, pauses, seeks and snapshots."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from longvideo.errors import UserError
from longvideo.infer.closing import ClosedAtEnd
from longvideo.infer.generation import GeneratedChunk
from longvideo.infer.options import check_path, whole_number
from longvideo.infer.script import PromptError
from longvideo.infer.snapshot import SessionOptions, Snapshot, write_snapshot
from longvideo.infer.timeline import MAX_CHUNK, LiveSteps, Receipt, Shots, SwitchMode, shot_at

if TYPE_CHECKING:
    from longvideo.infer.history import History, Past


class Session(ClosedAtEnd, Iterator[GeneratedChunk]):
    """An iterator over the chunks of a running video: frames, the step (number and prompt), and the time they took.

    One thread iterates; every other method may be called at any time, from any thread. Close a session, or use it as a
    context manager, to stop the work that runs ahead.
    """

    def __init__(
        self,
        steps: LiveSteps,
        options: SessionOptions,
        history: History,
        *,
        generate: Callable[[LiveSteps, Past | None], Generator[GeneratedChunk, None, None]],
        check_words: Callable[[str, str], None],
    ) -> None:
        """Start a video, or continue one.

        steps: those after the history. history: chunks to continue; empty for a new video. generate: generates the
        chunks of steps after a past. check_words: warns about words of a prompt and a negative prompt that the
        model has not learned.
        """
        self.options = options
        self.notice: str | None = None  # warning about the snapshot, picture or video that the session begins with
        self._history, self._generate, self._check_words = history, generate, check_words
        # _turn is held while a chunk is waited for, _lock only for a moment
        self._turn, self._lock = threading.Lock(), threading.Lock()
        self._steps, self._past = steps, history.past_of(len(history))
        self._chunks: Generator[GeneratedChunk, None, None] | None = None
        self._is_outdated = self._is_closed = False  # outdated: _chunks belongs to the branch before a seek

    @property
    def next_chunk(self) -> int:
        """Number of the chunk that the iterator returns next."""
        with self._lock:
            return len(self._history)

    @property
    def shots(self) -> Shots:
        """All shots: past, present and planned ones."""
        with self._lock:
            return self._steps.shots

    @property
    def is_paused(self) -> bool:
        """Whether no chunk begins until `resume`."""
        with self._lock:
            return self._steps.is_paused

    def set_prompt(self, prompt: str, mode: SwitchMode = "cut", *, negative_prompt: str | None = None) -> Receipt:
        """Show another prompt from the next chunk that begins; chunks that have begun keep theirs.

        mode: "cut" starts a new shot. "keep" continues the scene under the new text. "recache" does so as well, and
        first runs the clean pass of the window again under the new text. negative_prompt: text that guidance leads away
        from; None keeps that of the shot before.
        Raises PromptError for texts that cannot be used, such as a negative prompt without guidance.
        """
        with self._lock:
            receipt = self._steps.add_shot(prompt, mode, negative_prompt=negative_prompt)
        self._check_words(prompt, negative_prompt or "")
        return receipt

    def add_shot(
        self, prompt: str, *, chunk: int, mode: SwitchMode = "cut", negative_prompt: str | None = None
    ) -> Receipt:
        """Show another prompt from a later chunk. mode, negative_prompt: as in `set_prompt`.

        Raises PromptError as `set_prompt` does, and UserError for a chunk that has begun, or after the end of the
        video.
        """
        with self._lock:
            receipt = self._steps.add_shot(prompt, mode, negative_prompt=negative_prompt, chunk=chunk)
        self._check_words(prompt, negative_prompt or "")
        return receipt

    def pause(self) -> None:
        """Begin no chunk until `resume`; the iterator waits for it."""
        with self._lock:
            self._steps.pause()

    def resume(self) -> None:
        """Begin chunks again after `pause`."""
        with self._lock:
            self._steps.resume()

    def seek(
        self, chunk: int, *, prompt: str | None = None, mode: SwitchMode = "cut", negative_prompt: str | None = None
    ) -> Receipt:
        """Go back: the iterator returns `chunk` next, generated again, and later chunks are deleted.

        prompt: prompt of another branch that starts there; without one, the chunk is generated as it was. Planned shots
        that have not begun stay. mode, negative_prompt: as in `set_prompt`; they need a prompt.
        The chunks that it attends to get a prefill. If they had attended to chunks that have left the window, the
        result is close to the first one, but not equal.
        Raises UserError for a chunk that is footage or not generated yet, and for one so far back that latents it
        needs are deleted.
        """
        chunk = whole_number(chunk, "chunk", 0, MAX_CHUNK)
        if chunk < self.options.footage_chunks:
            raise UserError(f"chunk {chunk} is footage; use {self.options.footage_chunks} or a later one")
        if prompt is None and negative_prompt is not None:
            raise PromptError("there is a negative prompt without a prompt; give both, or none to repeat the chunk")
        with self._lock:
            past, next_step = self._history.past_of(chunk), self._steps.next_chunk
            shots = {first: shot for first, shot in self._steps.shots.items() if first <= chunk or first >= next_step}
            before = shot_at(shots, chunk)
            if prompt is not None:
                # the mode of another branch replaces that of the shot, so the shot is removed, or has the weakest mode
                if chunk > 0:
                    shots.pop(chunk, None)
                else:
                    shots[0] = replace(shots[0], mode="keep")
            steps = self._steps.branch(shots, first=chunk)
            receipt = Receipt(max(0, next_step - 1), chunk)
            if prompt is not None:
                own = before.negative_prompt if negative_prompt is None else negative_prompt
                steps.add_shot(prompt, mode, negative_prompt=own)
            if self._steps.is_paused:
                steps.pause()
            self._history.truncate(chunk)
            self._steps.close()
            self._steps, self._past, self._is_outdated = steps, past, True
        if prompt is not None:
            self._check_words(prompt, negative_prompt or "")
        return receipt

    def snapshot(self, path: str | Path) -> None:
        """Write a file from which `StreamingPipeline.restore` continues after the last chunk that was returned."""
        check_path(path, "the snapshot")
        with self._lock:
            snapshot = Snapshot(self.options, self._steps.shots, self._history.steps, self._history.records)
        write_snapshot(snapshot, Path(path))

    def __next__(self) -> GeneratedChunk:
        with self._turn:
            while True:
                with self._lock:
                    leave = self._is_outdated or self._is_closed
                    steps, past, self._is_outdated = self._steps, self._past, False
                if leave and self._chunks is not None:
                    self._chunks.close()
                    self._chunks = None
                if self._is_closed:
                    raise StopIteration
                if self._chunks is None:
                    self._chunks = self._generate(steps, past)
                chunk = next(self._chunks, None)
                with self._lock:
                    if self._is_outdated:  # there was a seek while the chunk was generated
                        continue
                    if chunk is None:
                        raise StopIteration
                    if chunk.is_complete:
                        self._history.add(chunk.record)
                return chunk

    def close(self) -> None:
        """Stop generating; a thread that waits for a chunk gets it first. Closing twice does nothing."""
        with self._lock:
            self._is_closed = True
            self._steps.close()
        with self._turn:
            if self._chunks is not None:
                self._chunks.close()
                self._chunks = None
