"""Text features of prompts that are all known before anything else is loaded, so that their encoder can be freed.

Legend: P prompts, L text positions, S of them up to the last token of a prompt, D feature width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch.nn import functional

from longvideo.errors import UserError
from longvideo.text.encoder import clean_prompt, shown_prompt, stack_features

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Sequence

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
    """The features of prompts, their unknown words and numbers of tokens, without the encoder.

    Features are in host memory without their zeros, since there may be thousands of prompts.
    """

    def __init__(self, encoder: PromptEncoder, prompts: Iterable[str], *, counted: Iterable[str] = ()) -> None:
        """Encode prompts one by one, as `TextEncoder.encode` does. counted: texts whose tokens are counted too."""
        distinct = dict.fromkeys(map(clean_prompt, prompts))
        self._text_len = 0
        self._features_SD = {prompt: self._encoded(encoder, prompt) for prompt in distinct}
        self._unknown = {prompt: encoder.unknown_words(prompt) for prompt in distinct}
        texts = dict.fromkeys([*distinct, *map(clean_prompt, counted)])
        self._num_tokens = {text: encoder.num_tokens(text) for text in texts}

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the features [P, L, D] of the distinct prompts, and the row of each prompt, int64 [len(prompts)].

        They are in host memory. Raises UserError for a prompt that was not encoded.
        """
        return stack_features([self._known(prompt, self._features_SD) for prompt in prompts], self._features_LD)

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words that are not in the vocabulary. Raises UserError for a prompt that was not encoded."""
        return self._unknown[self._known(prompt, self._unknown)]

    def num_tokens(self, prompt: str) -> int:
        """Return the number of tokens of a text. Raises UserError for one that was neither encoded nor counted."""
        return self._num_tokens[self._known(prompt, self._num_tokens)]

    def _encoded(self, encoder: PromptEncoder, prompt: str) -> Tensor:
        features_LD = encoder.encode([prompt])[0][0]
        self._text_len = features_LD.shape[0]
        used = features_LD.any(dim=1).nonzero()
        return features_LD[: int(used.max()) + 1 if len(used) else 0].to("cpu", copy=True)

    def _features_LD(self, prompt: str) -> Tensor:
        features_SD = self._features_SD[prompt]
        return functional.pad(features_SD, (0, 0, 0, self._text_len - features_SD.shape[0]))

    def _known(self, prompt: str, texts: Container[str]) -> str:
        cleaned = clean_prompt(prompt)
        if cleaned not in texts:
            raise UserError(
                f"the text encoder was freed after {len(self._features_SD)} prompts, and {shown_prompt(cleaned)} is not"
                " one of them; load the model without prompts"
            )
        return cleaned
