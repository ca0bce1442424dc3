"""Prompts to text features: tokens, the UMT5 encoder, and zeros at the padding, as Wan conditions on them.

Legend: P prompts, S tokens computed, L text positions (text_len), D feature width.
"""

from __future__ import annotations

import html
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from longvideo.errors import CheckpointError
from longvideo.files import check_text, write_json, write_text
from longvideo.umt5 import UMT5Config, UMT5Encoder

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
PAD_ID, END_ID, UNKNOWN_ID = 0, 1, 2
PUNCTUATION = ".,;:!?'\"-()"
TOKENS_MULTIPLE = 16
MAX_CACHED_PROMPTS = 64
TINY_SIZES = {"d_model": 128, "d_kv": 32, "num_heads": 4, "d_ff": 256, "num_layers": 2}


class TextEncoder(nn.Module):
    """Tokenizer and UMT5 encoder; features are zero at padded positions and text_len long.

    tokenizer: ends each prompt with </s>, pads with id 0.
    """

    model: UMT5Encoder
    tokenizer: Tokenizer

    def __init__(self, model: UMT5Encoder, tokenizer: Tokenizer, *, text_len: int = 512) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.text_len = text_len
        self._features: dict[str, Tensor] = {}
        self._features_version = 0

    @classmethod
    def build_tiny(cls, words: Iterable[str], *, seed: int = 0, text_len: int = 512) -> TextEncoder:
        """Build a small random encoder that knows exactly these words and common punctuation."""
        tokenizer = word_tokenizer(words)
        with torch.random.fork_rng(devices=[]):
            model = UMT5Encoder(UMT5Config(vocab_size=tokenizer.get_vocab_size(), **TINY_SIZES))
        model.initialize(torch.Generator().manual_seed(seed))
        return cls(model, tokenizer, text_len=text_len)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def config_json(self) -> dict[str, Any]:
        """Return the config.json by which transformers opens the model."""
        return self.model.config.to_dict()

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ids and mask, both long [P, S]: S is the longest prompt rounded up to a multiple of 16.

        Prompts are cleaned first. One of more than text_len tokens loses its end, with a warning; </s> stays.
        """
        rows = [self._ids(clean_prompt(prompt)) for prompt in prompts]
        longest = max((len(row) for row in rows), default=1)
        num_tokens = min(-(-longest // TOKENS_MULTIPLE) * TOKENS_MULTIPLE, self.text_len)
        ids_PS = torch.full((len(rows), num_tokens), PAD_ID)
        mask_PS = torch.zeros_like(ids_PS)
        for index, row in enumerate(rows):
            ids_PS[index, : len(row)] = torch.tensor(row)
            mask_PS[index, : len(row)] = 1
        return ids_PS.to(self.device), mask_PS.to(self.device)

    def forward(self, ids_PS: Tensor, mask_PS: Tensor) -> Tensor:
        """Encode tokens to features [P, L, D]. Padding is masked inside and zero in the result."""
        features_PSD = self.model(ids_PS, mask_PS)
        features_PSD = features_PSD.masked_fill(mask_PS.unsqueeze(-1) == 0, 0.0)
        return nn.functional.pad(features_PSD, (0, 0, 0, self.text_len - features_PSD.shape[1]))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the features [P, L, D] of the distinct prompts and the row of each given prompt, long [len(prompts)].

        Every distinct prompt is computed once, alone, so its features do not depend on its neighbours, and the latest
        64 are kept for later calls until a weight changes.
        """
        cleaned = [clean_prompt(prompt) for prompt in prompts]
        row_of = {prompt: row for row, prompt in enumerate(dict.fromkeys(cleaned))}
        features_PLD = torch.stack([self._encode_one(prompt) for prompt in row_of])
        return features_PLD, torch.tensor([row_of[prompt] for prompt in cleaned], device=features_PLD.device)

    def unknown_words(self, prompt: str) -> list[str]:
        """Name the words the vocabulary lacks, once each, as they are written in the prompt."""
        text = clean_prompt(prompt)
        encoding = self.tokenizer.encode(text)
        unknown = self.tokenizer.token_to_id(UNKNOWN)
        spans = [span for token, span in zip(encoding.ids, encoding.offsets, strict=True) if token == unknown]
        return list(dict.fromkeys(text[start:end] for start, end in spans))

    def _encode_one(self, prompt: str) -> Tensor:
        # tensors made in inference mode count no versions, and cannot be changed outside it
        counted = (parameter for parameter in self.model.parameters() if not parameter.is_inference())
        version = sum(parameter._version for parameter in counted) + id(self.model)
        if version != self._features_version or self.training:
            self._features.clear()
            self._features_version = version
        # several videos may be made at once: each step is whole in itself, and the newest is the last
        features_SD = self._features.pop(prompt, None)
        if features_SD is None:
            ids_PS, mask_PS = self.tokenize([prompt])
            features_SD = self.forward(ids_PS, mask_PS)[0, : ids_PS.shape[1]]
        self._features[prompt] = features_SD
        for oldest in list(self._features)[:-MAX_CACHED_PROMPTS]:
            self._features.pop(oldest, None)
        return nn.functional.pad(features_SD, (0, 0, 0, self.text_len - features_SD.shape[0]))

    def _ids(self, text: str) -> list[int]:
        check_text(text, "the prompt")
        ids = self.tokenizer.encode(text).ids
        if len(ids) > self.text_len:
            start = text if len(text) <= 40 else text[:40] + "..."
            warnings.warn(
                f"prompt {start!r} has {len(ids)} tokens; only the first {self.text_len} are used", stacklevel=3
            )
            ids = ids[: self.text_len - 1] + ids[-1:]
        return ids


def clean_prompt(prompt: str) -> str:
    """Resolve HTML entities, twice as Wan does, and collapse white space.

    Wan also mends mis-decoded text with ftfy where it is installed; left out, so the result is the same everywhere.
    """
    return " ".join(html.unescape(html.unescape(prompt)).split())


def word_tokenizer(words: Iterable[str]) -> Tokenizer:
    """Build a tokenizer of whole lower-case words, split at white space and punctuation."""
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    splitter = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    pieces = {piece for word in words for piece, _ in splitter.pre_tokenize_str(normalizer.normalize_str(word))}
    special = {PAD: PAD_ID, END: END_ID, UNKNOWN: UNKNOWN_ID}
    ordinary = sorted((pieces | set(PUNCTUATION)) - set(special))
    vocabulary = special | {word: index for index, word in enumerate(ordinary, start=len(special))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, END_ID)])
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read tokenizer.json of a tokenizer folder (google/umt5-xxl and the tiny model both have one)."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"no tokenizer.json in {folder}; save the tokenizer with save_pretrained to make one")
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:
        # tokenizers raises a bare Exception for any content it cannot use
        if type(error) not in (Exception, UnicodeDecodeError):
            raise
        raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
    found = (tokenizer.token_to_id(PAD), tokenizer.token_to_id(END))
    if found != (PAD_ID, END_ID):
        raise CheckpointError(f"{path} has {PAD} and {END} at ids {found}; wanted ({PAD_ID}, {END_ID}) as UMT5 has")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, text_len: int) -> None:
    """Write tokenizer.json and the small files by which transformers' AutoTokenizer opens the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": text_len,
        "pad_token": PAD,
        "eos_token": END,
        "unk_token": UNKNOWN,
    }
    write_json(folder / "tokenizer_config.json", config)
