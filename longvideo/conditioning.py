"""What a chunk is made from: its prompt, whether it opens a shot, and a known first frame."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from longvideo.model.transformer import TextContext


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
