"""Several phrasings of every scene's caption, tokenised once and kept on the training device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longvideo.shapeworld.captions import caption
from longvideo.shapeworld.world import Scene
from longvideo.text import TextEncoder


@dataclass(frozen=True)
class TokenTable:
    """ids, mask: long [scenes, phrasings, tokens]; empty_ids, empty_mask: [tokens] of the empty prompt."""

    ids: Tensor
    mask: Tensor
    empty_ids: Tensor
    empty_mask: Tensor

    @property
    def phrasings(self) -> int:
        return self.ids.shape[1]


def tokenize_captions(
    scenes: Sequence[Scene], encoder: TextEncoder, *, phrasings: int, omit: float, device: torch.device
) -> TokenTable:
    """Phrase and tokenise. omit: share of captions that leave out the sizes, and the background."""
    texts = [
        caption(scene, index * phrasings + p, omit=omit) for index, scene in enumerate(scenes) for p in range(phrasings)
    ]
    ids, mask = encoder.tokenize([*texts, ""])
    ids, mask = ids.to(device), mask.to(device)
    shape = (len(scenes), phrasings, -1)
    return TokenTable(ids[:-1].view(shape), mask[:-1].view(shape), ids[-1], mask[-1])
