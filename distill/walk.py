"""Go through a clip chunk by chunk, as streaming does: every chunk sees the clean ones before it through a cache.

Student, critic and teacher all look at a clip this way, so whatever its length, only one chunk is ever in flight, and
what training sees is what generation computes. Shapes: N chunks, B batch, C channels, T latent frames of a chunk, H W
latent size, P prompts, J text positions, D text width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.model.attention import Cached, Filling
from longvideo.model.layout import TokenLayout

if TYPE_CHECKING:
    from longvideo.distill.roles import Network
    from longvideo.model.cache import ChunkCache
    from longvideo.model.rope import Rope
    from longvideo.model.spec import ChunkSpec


@dataclass(frozen=True)
class VideoRequest:
    """What a batch of videos is asked to show.

    features_PJD: of distinct texts, as `longvideo.model.conditioning.batch_texts` has them, the negative prompt last.
    prompt_NB: the row of features that a sample follows in a chunk, int64. cuts: chunks that open a shot; samples of
    one batch share them, as they share slots of the cache. first_latent: [B, C, 1, H, W], the given first frame (image
    to video). samples: number of every sample within the step, of which its noise is a function. step: likewise.
    """

    features_PJD: Tensor
    prompt_NB: Tensor
    cuts: tuple[bool, ...]
    samples: tuple[int, ...]
    step: int
    first_latent: Tensor | None = None

    @property
    def num_chunks(self) -> int:
        return len(self.cuts)

    @property
    def batch(self) -> int:
        return len(self.samples)

    def weight(self, index: int, frames: int) -> Tensor:
        """Return [B, T]: 0 for frames of a chunk that are given, 1 for those that are made."""
        weight = torch.ones(self.batch, frames, device=self.features_PJD.device)
        if index == 0 and self.first_latent is not None:
            weight[:, 0] = 0
        return weight

    def hold(self, index: int, x_BCTHW: Tensor) -> Tensor:
        """Put the given first frame into the latents of a chunk."""
        if index or self.first_latent is None:
            return x_BCTHW
        return torch.cat((self.first_latent.to(x_BCTHW), x_BCTHW[:, :, 1:]), dim=2)


class Walk:
    """One network's way through a clip. `velocity` may be asked for any number of times; `finish` goes on.

    negative: follow the negative prompt instead. The network must keep its role until the walk is done.
    """

    def __init__(
        self, network: Network, clip: VideoRequest, spec: ChunkSpec, cache: ChunkCache, *, negative: bool = False
    ):
        self.network, self.clip, self.spec, self.cache = network, clip, spec, cache
        self.index = 0
        self._rows_NB = torch.full_like(clip.prompt_NB, clip.features_PJD.shape[0] - 1) if negative else clip.prompt_NB
        with torch.no_grad():
            self._text = network.encode_text(clip.features_PJD)
            self._rope = self._position()

    def velocity(self, x_BCTHW: Tensor, sigma_BT: Tensor, *, checkpoint: bool = False) -> Tensor:
        """Return the velocity of the live chunk, differentiable where gradients are enabled.

        A gradient reaches the network through this chunk alone: what is cached is detached.
        """
        rows_B = self._rows_NB[self.index]
        text = self._text.select(rows_B)
        if torch.is_grad_enabled():
            text = self.network.encode_text(self.clip.features_PJD[rows_B])
        return self.network(
            x_BCTHW, sigma_BT, text, rope=self._rope, attention=Cached(self.cache), checkpoint=checkpoint
        )

    @torch.no_grad()
    def finish(self, latents_BCTHW: Tensor, sigma_BT: Tensor) -> None:
        """Keep the live chunk, as it is at a noise level, for the chunks after it, and go on to the next."""
        text = self._text.select(self._rows_NB[self.index])
        self.network.fill_cache(latents_BCTHW, sigma_BT, text, rope=self._rope, attention=Filling(self.cache))
        self.cache.commit(cut=self.clip.cuts[self.index])
        self.index += 1
        self._rope = self._position()

    def _position(self) -> Rope:
        shot = sum(self.clip.cuts[1 : self.index + 1])
        layout = TokenLayout.one_chunk(self.spec, self.index, shot=shot)
        return self.network.rope(layout.to(self.clip.features_PJD.device))
