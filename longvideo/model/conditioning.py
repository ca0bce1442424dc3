"""Conditioning of a chunk: its prompt, whether it opens a shot, and a given first frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.model.transformer import TextContext

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Conditioning:
    """Conditioning of one chunk for a batch of samples.

    text: keys and values of the distinct prompts, from `CausalTransformer.encode_text`.
    prompt_index: row of `text` that each sample follows, [B] int64.
    negative_index: row from which guidance moves each sample away, [B] int64; needed only if guidance is not 1.
    cut: whether this chunk opens a shot. Samples of one batch share their cuts.
    recache: whether the past in the window goes through the clean pass again, under this text, before this chunk.
    first_latent: normalized clean latent of the given first frame, [B, C, 1, H, W]; first chunk only.
    """

    text: TextContext
    prompt_index: Tensor
    negative_index: Tensor | None = None
    cut: bool = False
    recache: bool = False
    first_latent: Tensor | None = None


@dataclass(frozen=True)
class ChunkTexts:
    """Texts that the text encoder reads for a batch of videos.

    texts: distinct texts, the negative prompt last. rows_NB: row in `texts` of every sample in each of N chunks, int64.
    """

    texts: tuple[str, ...]
    rows_NB: Tensor


def chunk_text(prompt: str, *, cut: bool, cut_prefix: str) -> str:
    """Return the text of a chunk. cut: whether the chunk opens a shot after another one."""
    return cut_prefix + prompt if cut else prompt


def video_texts(prompts: Sequence[str], cuts: Sequence[bool], *, cut_prefix: str) -> tuple[str, ...]:
    """Return the texts of the chunks of a video. The first chunk has no cut prefix."""
    return tuple(
        chunk_text(prompt, cut=cut and index > 0, cut_prefix=cut_prefix)
        for index, (prompt, cut) in enumerate(zip(prompts, cuts, strict=True))
    )


def batch_texts(
    prompts: Sequence[Sequence[str]], cuts: Sequence[bool], *, cut_prefix: str, negative_prompt: str = ""
) -> ChunkTexts:
    """Return the texts of videos that share their cuts. prompts: prompts of the chunks of each video."""
    texts = [video_texts(own, cuts, cut_prefix=cut_prefix) for own in prompts]
    rows = {text: row for row, text in enumerate(dict.fromkeys(text for own in texts for text in own))}
    rows_NB = torch.tensor([[rows[text] for text in own] for own in texts]).T
    return ChunkTexts((*rows, negative_prompt), rows_NB)
