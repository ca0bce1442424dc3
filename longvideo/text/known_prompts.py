"""Text features of prompts that are all known before anything else is loaded, so that their encoder can be freed.

Legend: P prompts, L text positions, D feature width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from longvideo.errors import UserError
from longvideo.text.encoder import clean_prompt, shown_prompt, stack_features

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor


class PromptEncoder(Protocol):
    """What generation needs of a text encoder: a `TextEncoder`, or `KnownPrompts` in its place."""

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the features [P, L, D] of the distinct prompts, and the row of each prompt, int64 [len(prompts)]."""
        ...

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words that are not in the vocabulary, once each, as they are written in the prompt."""
        ...

    def num_tokens(self, prompt: str) -> int:
        """Return the number of tokens of a prompt, before it is cut to the positions of the model."""
        ...


class KnownPrompts:
    """The features of prompts, their unknown words and numbers of tokens, without the encoder."""

    def __init__(self, encoder: PromptEncoder, prompts: Iterable[str]) -> None:
        """Encode prompts one by one, as `TextEncoder.encode` does."""
        distinct = dict.fromkeys(map(clean_prompt, prompts))
        self._features_LD = {prompt: encoder.encode([prompt])[0][0].clone() for prompt in distinct}
        self._unknown = {prompt: encoder.unknown_words(prompt) for prompt in distinct}
        self._num_tokens = {prompt: encoder.num_tokens(prompt) for prompt in distinct}

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the features [P, L, D] of the distinct prompts, and the row of each prompt, int64 [len(prompts)].

        Raises UserError for a prompt that was not encoded.
        """
        return stack_features([self._known(prompt) for prompt in prompts], self._features_LD.__getitem__)

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words that are not in the vocabulary. Raises UserError for a prompt that was not encoded."""
        return self._unknown[self._known(prompt)]

    def num_tokens(self, prompt: str) -> int:
        """Return the number of tokens of a prompt. Raises UserError for a prompt that was not encoded."""
        return self._num_tokens[self._known(prompt)]

    def _known(self, prompt: str) -> str:
        cleaned = clean_prompt(prompt)
        if cleaned not in self._features_LD:
            raise UserError(
                f"the text encoder was freed after {len(self._features_LD)} prompts, and {shown_prompt(cleaned)} is not"
                " one of them; load the model without prompts"
            )
        return cleaned
