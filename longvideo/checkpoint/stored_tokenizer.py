"""Where the tokenizer of a model is stored: in a folder, or inside of the file of its text encoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from longvideo.checkpoint.tensors import Lazy, Weights, read
from longvideo.errors import CheckpointError
from longvideo.files import copy_file, write_bytes
from longvideo.text.sentencepiece import MAX_BYTES
from longvideo.text.tokenizer import TOKENIZER_FILE, load_tokenizer, save_tokenizer, tokenizer_of_sentencepiece

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SENTENCEPIECE_TENSOR = "spiece_model"
"""Last part of the name of the tensor in which ComfyUI's files of a text encoder have its tokenizer."""
SENTENCEPIECE_FILE = "spiece.model"
FILES = (TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json", SENTENCEPIECE_FILE)


class StoredTokenizer(Protocol):
    """A tokenizer on disk. name: its file, for errors."""

    @property
    def name(self) -> str: ...

    def load(self, *, rows: int) -> Tokenizer:
        """Read the tokenizer. rows: number of embeddings of the text encoder. Raises CheckpointError."""
        ...

    def write(self, folder: Path, *, rows: int, text_len: int) -> None:
        """Write its files into a folder. rows: as of `load`. text_len: text positions, tokens."""
        ...


@dataclass(frozen=True)
class TokenizerFolder:
    """A folder with tokenizer.json."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path / TOKENIZER_FILE)

    def load(self, *, rows: int) -> Tokenizer:
        return load_tokenizer(self.path, rows=rows)

    def write(self, folder: Path, *, rows: int, text_len: int) -> None:  # noqa: ARG002 (files are copied unchanged)
        folder.mkdir(parents=True, exist_ok=True)
        for file in FILES:
            if (self.path / file).is_file():
                copy_file(self.path / file, folder / file)


@dataclass(frozen=True)
class EmbeddedTokenizer:
    """A SentencePiece model in a tensor of bytes. name: file and name of the tensor."""

    tensor: Lazy
    name: str

    def load(self, *, rows: int) -> Tokenizer:
        return tokenizer_of_sentencepiece(self._bytes(), rows=rows, name=self.name)

    def write(self, folder: Path, *, rows: int, text_len: int) -> None:
        save_tokenizer(self.load(rows=rows), folder, text_len=text_len)
        write_bytes(folder / SENTENCEPIECE_FILE, self._bytes())

    def _bytes(self) -> bytes:
        return read(self.tensor).numpy().tobytes()


def take_tokenizer(weights: Weights) -> tuple[Weights, StoredTokenizer | None]:
    """Return weights without the tokenizer among them, and the tokenizer; None if there is no such tensor.

    Raises CheckpointError for a tokenizer of another type than bytes, for one that is too large, and for two of them.
    """
    names = [name for name in weights.infos if name.rpartition(".")[2] == SENTENCEPIECE_TENSOR]
    if not names:
        return weights, None
    info = weights.infos[names[0]]
    if len(names) > 1 or info.dtype != torch.uint8 or info.num_bytes > MAX_BYTES:
        raise CheckpointError(
            f"{weights.label}: {names[0]} is {info.dtype} {list(info.shape)}, one of {len(names)}; expected one"
            f" SentencePiece model, torch.uint8 of at most {MAX_BYTES:,} bytes"
        )
    tokenizer = EmbeddedTokenizer(weights.tensors[names[0]], f"{weights.label}: {names[0]}")
    return weights.replaced({names[0]: None}), tokenizer
