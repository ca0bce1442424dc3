"""Generate sample videos of a model while it is trained, as `generate` makes them with the exported model.

Shapes: N chunks, B samples, P texts, J text positions, D text width, C channels, T frames, H W pixels.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from longvideo.flow.unipc import UniPC
from longvideo.model.cache import ChunkCache, KVCache
from longvideo.model.conditioning import Conditioning
from longvideo.pixels import to_uint8
from longvideo.rollout import CachedTransformer, branches, rollout

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Sequence

    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.checkpoint.settings import ModelSettings
    from longvideo.model.spec import ChunkSpec
    from longvideo.model.transformer import CausalTransformer
    from longvideo.vae.autoencoder import Autoencoder


class SampleDecoder:
    """The autoencoder of a model folder: loaded for the first sample, and kept on the CPU between samples."""

    def __init__(self, folder: ModelFolder, *, device: torch.device, dtype: torch.dtype) -> None:
        self.folder, self.device, self.dtype = folder, device, dtype
        self._autoencoder: Autoencoder | None = None

    @contextmanager
    def on_device(self) -> Generator[Autoencoder]:
        """Yield the autoencoder on its device."""
        if self._autoencoder is None:
            self._autoencoder = self.folder.load_vae(dtype=self.dtype)
        try:
            yield self._autoencoder.to(self.device)
        finally:
            self._autoencoder.to("cpu")


@dataclass(frozen=True)
class Samples:
    """Sample videos. frames: uint8 [T, H, W, 3] of each. latents: [B, C, T, h, w], normalized, bf16, on the CPU."""

    frames: list[np.ndarray]
    latents: Tensor

    @classmethod
    def join(cls, parts: Sequence[Samples]) -> Samples:
        """Return the samples of several calls together. parts: at least one, of videos of one size."""
        return cls([frames for part in parts for frames in part.frames], torch.cat([part.latents for part in parts]))


def sample_latents(
    transformer: CausalTransformer,
    settings: ModelSettings,
    spec: ChunkSpec,
    *,
    features_PJD: Tensor,
    rows_NB: Tensor,
    cuts: Sequence[bool],
    seeds: Sequence[int],
    first_latent: Tensor | None = None,
    cache_type: type[ChunkCache] = KVCache,
) -> Iterator[Tensor]:
    """Return an iterator over the chunks of a video for every seed: normalized latents [B, C, T, h, w].

    features_PJD: output of the text encoder for the texts of `batch_texts`. rows_NB: rows of `batch_texts`. cuts:
    whether each chunk opens a shot. seeds: seed of each sample's noise. first_latent: [B, C, 1, h, w], normalized; it
    is kept as the first latent frame. cache_type: class of the KV cache.
    """
    return rollout(
        CachedTransformer(transformer, spec, batch=branches(settings.guidance) * len(seeds), cache_type=cache_type),
        _conditionings(transformer, features_PJD, rows_NB, cuts, first_latent),
        solver=UniPC(settings.steps, settings.shift),
        generators=[torch.Generator().manual_seed(seed) for seed in seeds],
        guidance=settings.guidance,
        clean_pass=settings.clean_pass,
    )


@torch.no_grad()
def decode_samples(autoencoder: Autoencoder, chunks: Iterable[Tensor]) -> Samples:
    """Decode videos chunk by chunk. chunks: at least one, as `sample_latents` yields them."""
    weight = autoencoder.post_quant_conv.weight
    state, frames, all_latents = None, [], []
    for latents in chunks:
        video, state = autoencoder.decode(autoencoder.denormalize(latents).to(weight), state)
        frames.append(to_uint8(video).cpu().numpy())
        all_latents.append(latents.bfloat16().cpu())
    return Samples(list(np.concatenate(frames, axis=1)), torch.cat(all_latents, dim=2))


def _conditionings(
    transformer: CausalTransformer,
    features_PJD: Tensor,
    rows_NB: Tensor,
    cuts: Sequence[bool],
    first_latent: Tensor | None,
) -> Iterator[Conditioning]:
    text = transformer.encode_text(features_PJD)
    negative_B = torch.full_like(rows_NB[0], len(features_PJD) - 1)
    for index, (rows_B, cut) in enumerate(zip(rows_NB, cuts, strict=True)):
        yield Conditioning(
            text=text,
            prompt_index=rows_B,
            negative_index=negative_B,
            cut=cut and index > 0,
            first_latent=None if index else first_latent,
        )
