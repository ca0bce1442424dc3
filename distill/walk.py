"""Walk through a clip chunk by chunk, as in streaming: every chunk sees the clean ones before it through a cache.

Student, critic and teacher all process a clip this way. So only one chunk is processed at a time, whatever the length
of the clip, and training sees what generation computes.

Shapes: N chunks, B batch, C channels, T latent frames of a chunk, H W latent size, P prompts, J text positions, D text
width.
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
    """A batch of videos to generate.

    features_PJD: features of the distinct texts of `longvideo.model.conditioning.batch_texts`, the negative prompt
    last. prompt_NB: row of features that a sample follows in a chunk, int64. cuts: whether each chunk opens a shot; the
    samples of a batch share their cuts, because they share slots of the cache. samples: number of each sample within
    the step. step: number of the step; step and sample number determine the noise. first_latent: [B, C, 1, H, W], the
    given first frame (image to video), or None.
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
        """Return [B, T]: 0 for given frames of a chunk, 1 for generated ones."""
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
    """One network's walk through a clip.

    `velocity` can be called any number of times; `finish` moves to the next chunk. negative: whether to use the
    negative prompt. The network must keep its role until the walk is done.
    """

    def __init__(
        self, network: Network, clip: VideoRequest, spec: ChunkSpec, cache: ChunkCache, *, negative: bool = False
    ) -> None:
        self.network, self.clip, self.spec, self.cache = network, clip, spec, cache
        self.index = 0
        self._rows_NB = torch.full_like(clip.prompt_NB, clip.features_PJD.shape[0] - 1) if negative else clip.prompt_NB
        with torch.no_grad():
            self._text = network.encode_text(clip.features_PJD)
            self._rope = self._position()

    def velocity(self, x_BCTHW: Tensor, sigma_BT: Tensor, *, checkpoint: bool = False) -> Tensor:
        """Return the velocity of the live chunk, differentiable if gradients are enabled.

        A gradient reaches the network through this chunk alone, because cached keys and values are detached.
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
        """Cache the live chunk, at a noise level, for later chunks, and move to the next one."""
        text = self._text.select(self._rows_NB[self.index])
        self.network.fill_cache(latents_BCTHW, sigma_BT, text, rope=self._rope, attention=Filling(self.cache))
        self.cache.commit(cut=self.clip.cuts[self.index])
        self.index += 1
        self._rope = self._position()

    def _position(self) -> Rope:
        shot = sum(self.clip.cuts[1 : self.index + 1])
        layout = TokenLayout.one_chunk(self.spec, self.index, shot=shot)
        return self.network.rope(layout.to(self.clip.features_PJD.device))
