"""A video whose prompt changes while it is being made."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from types import TracebackType

from longvideo.infer.generation import GeneratedChunk
from longvideo.infer.timeline import LiveSteps, SwitchMode


class Session(Iterator[GeneratedChunk]):
    """Iterate over chunks without end; `set_prompt` may be called at any time, also from another thread.

    Close it (or use it as a context manager) to stop the work that runs ahead.
    """

    def __init__(
        self,
        steps: LiveSteps,
        generate: Callable[[LiveSteps], Generator[GeneratedChunk, None, None]],
        check_words: Callable[[str], None],
    ) -> None:
        self._steps = steps
        self._chunks = generate(steps)
        self._check_words = check_words

    def set_prompt(self, prompt: str, mode: SwitchMode = "cut") -> int:
        """Change the prompt and return the index of the chunk from which it is shown.

        mode: "cut" starts a new shot, "keep" goes on with the same scene under the new text. Chunks already begun keep
        the prompt they were begun with.
        """
        index = self._steps.set_prompt(prompt, mode)
        self._check_words(prompt)
        return index

    def __next__(self) -> GeneratedChunk:
        return next(self._chunks)

    def close(self) -> None:
        """Stop making chunks. Closing twice does nothing."""
        self._chunks.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
