"""What a chunk is made from: its prompt, whether it opens a shot, and a known first frame."""

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
    prompt_index: [B] int64, the row of `text` that each sample follows.
    negative_index: [B] int64, the row that guidance moves away from; needed only when guidance is not 1.
    cut: this chunk opens a shot. Samples of one batch share their cuts.
    recache: before this chunk is begun, the past it looks at is run through the clean pass again, under this text.
    first_latent: [B, C, 1, H, W], the normalised clean latent of the first frame (image to video, first chunk only).
    """

    text: TextContext
    prompt_index: Tensor
    negative_index: Tensor | None = None
    cut: bool = False
    recache: bool = False
    first_latent: Tensor | None = None


@dataclass(frozen=True)
class ChunkTexts:
    """What the text encoder reads for a batch of videos.

    texts: distinct ones, the negative prompt last. rows_NB: int64, the text of every sample in each of N chunks.
    """

    texts: tuple[str, ...]
    rows_NB: Tensor


def chunk_text(prompt: str, *, cut: bool, cut_prefix: str) -> str:
    """Return what the text encoder reads for a chunk under a prompt. cut: the chunk opens a shot after another one."""
    return cut_prefix + prompt if cut else prompt


def video_texts(prompts: Sequence[str], cuts: Sequence[bool], *, cut_prefix: str) -> tuple[str, ...]:
    """Return what the text encoder reads for the chunks of a video. The first chunk opens a shot without a cut."""
    return tuple(
        chunk_text(prompt, cut=cut and index > 0, cut_prefix=cut_prefix)
        for index, (prompt, cut) in enumerate(zip(prompts, cuts, strict=True))
    )


def batch_texts(
    prompts: Sequence[Sequence[str]], cuts: Sequence[bool], *, cut_prefix: str, negative_prompt: str = ""
) -> ChunkTexts:
    """Return what the text encoder reads for videos that share their cuts; prompts: those of each video's chunks."""
    texts = [video_texts(own, cuts, cut_prefix=cut_prefix) for own in prompts]
    rows = {text: row for row, text in enumerate(dict.fromkeys(text for own in texts for text in own))}
    rows_NB = torch.tensor([[rows[text] for text in own] for own in texts]).T
    return ChunkTexts((*rows, negative_prompt), rows_NB)
