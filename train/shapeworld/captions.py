"""Several phrasings of every scene's caption, tokenized once and kept on the training device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.errors import ConfigError
from longvideo.model.conditioning import chunk_text
from longvideo.shapeworld.captions import caption
from longvideo.text.encoder import TOKENS_MULTIPLE, TextEncoder, clean_prompt
from longvideo.text.tokenizer import PAD_ID

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longvideo.shapeworld.world import Scene


@dataclass(frozen=True)
class TokenTable:
    """Tokens of all captions.

    ids, mask: long [2, scenes, phrasings, tokens], without and with the words that announce a cut. empty_ids,
    empty_mask: [tokens] of the empty prompt.
    """

    ids: Tensor
    mask: Tensor
    empty_ids: Tensor
    empty_mask: Tensor

    @property
    def phrasings(self) -> int:
        return self.ids.shape[2]


def tokenize_captions(
    scenes: Sequence[Scene],
    encoder: TextEncoder,
    *,
    phrasings: int,
    omit: float,
    device: torch.device,
    distinct: int | None = None,
    cut_prefix: str = "",
) -> TokenTable:
    """Phrase and tokenize captions.

    omit: share of captions that leave out the sizes, and of those that leave out the background. distinct: scenes this
    far apart have the same phrasings; by default all scenes have different ones.
    """
    texts = [
        caption(scene, index % (distinct or len(scenes)) * phrasings + p, omit=omit)
        for index, scene in enumerate(scenes)
        for p in range(phrasings)
    ]
    # all at once, in parallel: one at a time, a hundred thousand captions take half a minute
    announced = [clean_prompt(chunk_text(text, cut=True, cut_prefix=cut_prefix)) for text in texts if cut_prefix]
    rows = [encoding.ids for encoding in encoder.tokenizer.encode_batch([*texts, *announced, ""])]
    longest = max(map(len, rows))
    num_tokens = -(-longest // TOKENS_MULTIPLE) * TOKENS_MULTIPLE
    if num_tokens > encoder.text_len:
        raise ConfigError(
            f"captions have up to {longest} tokens; expected at most {encoder.text_len}, as the text encoder;"
            " use a larger model.text_len"
        )
    ids = torch.tensor([row + [PAD_ID] * (num_tokens - len(row)) for row in rows]).to(device)
    mask = (ids != PAD_ID).long()
    shape = (len(scenes), phrasings, -1)
    by_scene, seen = (x[:-1].unflatten(0, (-1, *shape[:2])).expand(2, *shape) for x in (ids, mask))
    return TokenTable(by_scene, seen, ids[-1], mask[-1])
