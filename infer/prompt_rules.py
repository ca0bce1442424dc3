"""Rules that the prompts of a video must meet for a model, checked before anything is generated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from longvideo.errors import shown
from longvideo.infer.script import PromptError, check_negative_prompt, check_prompt
from longvideo.model.conditioning import chunk_text
from longvideo.text.encoder import shown_prompt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longvideo.checkpoint.settings import ModelSettings
    from longvideo.infer.script import Script
    from longvideo.infer.timeline import LiveShot
    from longvideo.text.known_prompts import PromptEncoder


class TokenCounter(Protocol):
    """What the rules need of a text encoder, or of its tokenizer alone."""

    def num_tokens(self, prompt: str) -> int:
        """Return the number of tokens of a prompt, before it is cut to the positions of the model."""
        ...


class PromptRules:
    """Refuses prompts that are too long for a model, and negative prompts where there is no guidance.

    Tokens are counted with the words that announce a cut, since every prompt may come after one.
    """

    def __init__(self, tokens: TokenCounter, settings: ModelSettings, *, guidance: float | None) -> None:
        """guidance: scale of classifier-free guidance of the video; None means the model's own."""
        self._tokens, self._settings = tokens, settings
        self._guidance = settings.guidance if guidance is None else guidance

    def check_script(self, script: Script) -> None:
        """Raise PromptError for a script whose prompts cannot be used."""
        several = len(script.shots) > 1
        for number, (shot, negative_prompt) in enumerate(zip(script.shots, script.negative_prompts, strict=True), 1):
            of_shot = f" of shot {number}" if several else ""
            self._check_prompt(shot.prompt, f"the prompt{of_shot}")
            self._check_negative(negative_prompt, f"the negative prompt{of_shot}")

    def check_shot(self, shot: LiveShot) -> None:
        """Raise PromptError for a shot of a running video whose prompts cannot be used."""
        check_prompt(shot.prompt, "the prompt")
        check_negative_prompt(shot.negative_prompt, "the negative prompt")
        self._check_prompt(shot.prompt, "the prompt")
        self._check_negative(shot.negative_prompt, "the negative prompt")

    def _check_prompt(self, prompt: str, name: str) -> None:
        text = chunk_text(prompt, cut=True, cut_prefix=self._settings.cut_prefix)
        tokens, most = self._tokens.num_tokens(text), self._settings.text_len
        if tokens > most:
            with_prefix = " with the words that announce a cut" if text != prompt else ""
            raise PromptError(
                f"{name} has {tokens} tokens{with_prefix}; expected at most {most}; shorten {shown_prompt(prompt)}"
            )

    def _check_negative(self, text: str, name: str) -> None:
        if not text.strip():
            return
        own = self._settings.guidance
        if self._guidance == 1:
            remedy = "this model runs without it" if own == 1 else f"the model's own is {own:g}"
            raise PromptError(
                f"{name} has no effect without guidance, and guidance is 1; set guidance above 1 ({remedy}), or leave"
                " the negative prompt out",
                is_negative=True,
            )
        tokens, most = self._tokens.num_tokens(text), self._settings.text_len
        if tokens > most:
            message = f"{name} has {tokens} tokens; expected at most {most}; shorten {shown_prompt(text)}"
            raise PromptError(message, is_negative=True)


def unknown_words_warning(encoder: PromptEncoder, prompts: Sequence[str]) -> str | None:
    """Return a warning that names the words of prompts that an encoder's vocabulary does not contain, or None."""
    unknown = dict.fromkeys(word for prompt in prompts for word in encoder.unknown_words(prompt))
    if not unknown:
        return None
    words = ", ".join(map(shown, unknown))
    return f"the model's vocabulary does not contain {words}; the video may show something else"
