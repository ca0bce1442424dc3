"""Convert prompts to text features: tokens, the UMT5 encoder, and zeros at padded positions, as in Wan.

Legend: P prompts, S tokens computed, L text positions (text_len), D feature width.
"""

from __future__ import annotations

import html
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longvideo.errors import CheckpointError
from longvideo.files import check_text
from longvideo.text.panics import TokenizerError
from longvideo.text.tokenizer import PAD_ID, UNKNOWN, encode, word_tokenizer
from longvideo.text.umt5 import UMT5Config, UMT5Encoder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tokenizers import Encoding, Tokenizer

TOKENS_MULTIPLE = 16
MAX_CACHED_PROMPTS = 64
MAX_SHOWN = 40
"""Number of characters of a prompt that messages show."""
TINY_SIZES = {"d_model": 128, "d_kv": 32, "num_heads": 4, "d_ff": 256, "num_layers": 2}


class PromptTokenizer:
    """Counts and looks up the tokens of prompts, without the encoder."""

    def __init__(self, tokenizer: Tokenizer, *, name: str) -> None:
        """tokenizer: must end each prompt with </s>. name: file that it was read from, for errors."""
        self.tokenizer, self._name = tokenizer, name

    def num_tokens(self, prompt: str) -> int:
        """Return the number of tokens of a prompt, with its </s>, before it is cut to the positions of a model."""
        return len(self.ids(prompt))

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words that are not in the vocabulary, once each, as they are written in the prompt."""
        text = clean_prompt(prompt)
        encoding = self._encoding(text)
        unknown = self.tokenizer.token_to_id(UNKNOWN)
        spans = [span for token, span in zip(encoding.ids, encoding.offsets, strict=True) if token == unknown]
        return list(dict.fromkeys(text[start:end] for start, end in spans))

    def ids(self, prompt: str) -> list[int]:
        """Return the tokens of a prompt. Raises UserError for text that is not valid."""
        text = clean_prompt(prompt)
        check_text(text, "the prompt")
        return self._encoding(text).ids

    def _encoding(self, text: str) -> Encoding:
        try:
            return encode(self.tokenizer, text)
        except TokenizerError as error:
            raise CheckpointError(
                f"{self._name} cannot encode the prompt {shown_prompt(text)}: {error};"
                " change the prompt, or use the tokenizer of google/umt5-xxl"
            ) from error


class TextEncoder(nn.Module):
    """Tokenizer and UMT5 encoder. Features have text_len positions and are zero at padded ones.

    tokenizer: must end each prompt with </s> and pad with id 0. text_len: text positions, tokens. tokenizer_name:
    file that the tokenizer was read from, for errors.
    """

    model: UMT5Encoder
    tokenizer: Tokenizer

    def __init__(
        self, model: UMT5Encoder, tokenizer: Tokenizer, *, text_len: int = 512, tokenizer_name: str = "the tokenizer"
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.text_len = text_len
        self.prompt_tokenizer = PromptTokenizer(tokenizer, name=tokenizer_name)
        self._features: dict[str, Tensor] = {}
        self._features_version = 0

    @classmethod
    def build_tiny(cls, words: Iterable[str], *, seed: int = 0, text_len: int = 512) -> TextEncoder:
        """Build a small encoder with random weights. words: its vocabulary, with common punctuation added."""
        tokenizer = word_tokenizer(words)
        with torch.random.fork_rng(devices=[]):
            model = UMT5Encoder(UMT5Config(vocab_size=tokenizer.get_vocab_size(), **TINY_SIZES))
        model.initialize(torch.Generator().manual_seed(seed))
        return cls(model, tokenizer, text_len=text_len)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.model.parameters()).device

    def config_json(self) -> dict[str, Any]:
        """Return the config.json with which transformers opens the model."""
        return self.model.config.to_dict()

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ids and mask, both int64 [P, S]; S is the longest prompt, rounded up to a multiple of 16.

        Prompts are cleaned first. A prompt of more than text_len tokens is cut with a warning; its </s> is kept.
        """
        rows = [self._ids(prompt) for prompt in prompts]
        longest = max((len(row) for row in rows), default=1)
        num_tokens = min(-(-longest // TOKENS_MULTIPLE) * TOKENS_MULTIPLE, self.text_len)
        ids_PS = torch.full((len(rows), num_tokens), PAD_ID)
        mask_PS = torch.zeros_like(ids_PS)
        for index, row in enumerate(rows):
            ids_PS[index, : len(row)] = torch.tensor(row)
            mask_PS[index, : len(row)] = 1
        return ids_PS.to(self.device), mask_PS.to(self.device)

    def forward(self, ids_PS: Tensor, mask_PS: Tensor) -> Tensor:
        """Encode tokens to features [P, L, D]. Attention ignores padding, whose features are zero."""
        features_PSD = self.model(ids_PS, mask_PS)
        features_PSD = features_PSD.masked_fill(mask_PS.unsqueeze(-1) == 0, 0.0)
        return nn.functional.pad(features_PSD, (0, 0, 0, self.text_len - features_PSD.shape[1]))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the features [P, L, D] of the distinct prompts, and the row of each prompt, int64 [len(prompts)].

        Every distinct prompt is encoded once and alone, so its features do not depend on the other prompts. Those of
        the latest 64 prompts are cached until a weight changes.
        """
        return stack_features([clean_prompt(prompt) for prompt in prompts], self._encode_one)

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words that are not in the vocabulary, once each, as they are written in the prompt."""
        return self.prompt_tokenizer.unknown_words(prompt)

    def num_tokens(self, prompt: str) -> int:
        """Return the number of tokens of a prompt, as `PromptTokenizer.num_tokens` does."""
        return len(self.prompt_tokenizer.ids(prompt))

    def _encode_one(self, prompt: str) -> Tensor:
        # tensors of inference mode have no version counter, and cannot be changed outside of it
        counted = (parameter for parameter in self.model.parameters() if not parameter.is_inference())
        version = sum(parameter._version for parameter in counted) + id(self.model)
        if version != self._features_version or self.training:
            self._features.clear()
            self._features_version = version
        # threads may encode at the same time: each operation on the dict is atomic, and the newest entry is the last
        features_SD = self._features.pop(prompt, None)
        if features_SD is None:
            ids_PS, mask_PS = self.tokenize([prompt])
            features_SD = self.forward(ids_PS, mask_PS)[0, : ids_PS.shape[1]]
        self._features[prompt] = features_SD
        for oldest in list(self._features)[:-MAX_CACHED_PROMPTS]:
            self._features.pop(oldest, None)
        return nn.functional.pad(features_SD, (0, 0, 0, self.text_len - features_SD.shape[0]))

    def _ids(self, prompt: str) -> list[int]:
        ids = self.prompt_tokenizer.ids(prompt)
        if len(ids) > self.text_len:
            name = shown_prompt(clean_prompt(prompt))
            warnings.warn(f"prompt {name} has {len(ids)} tokens; only the first {self.text_len} are used", stacklevel=3)
            ids = ids[: self.text_len - 1] + ids[-1:]
        return ids


def stack_features(prompts: Sequence[str], features_of: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
    """Return the features [P, L, D] of the distinct prompts, and the row of each prompt, int64 [len(prompts)].

    features_of: function that returns the features [L, D] of a prompt.
    """
    row_of = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    features_PLD = torch.stack([features_of(prompt) for prompt in row_of])
    return features_PLD, torch.tensor([row_of[prompt] for prompt in prompts], device=features_PLD.device)


def shown_prompt(text: str) -> str:
    """Return the beginning of a prompt in quotes, for messages."""
    return repr(text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "...")


def clean_prompt(prompt: str) -> str:
    """Resolve HTML entities, twice as Wan does, and collapse white space.

    Wan also repairs wrongly decoded text with ftfy if it is installed. This is omitted, so that the result does not
    depend on installed packages.
    """
    return " ".join(html.unescape(html.unescape(prompt)).split())
