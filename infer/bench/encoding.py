"""Time the encoding of a clip: whole, and in the parts that ranks encode, each with its halo."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.infer.bench.passes import wait_for
from longvideo.vae.autoencoder import Autoencoder
from longvideo.vae.halo import EncodeWindow, encode_latents, encode_window, temporal_lookback

if TYPE_CHECKING:
    from longvideo.vae.config import AutoencoderConfig


@dataclass(frozen=True)
class EncodeTiming:
    """Times of encoding a clip.

    latents: latent frames of the clip. halo: latent frames of the halo. whole_seconds: time of one rank that encodes
    the whole clip. part_seconds, part_frames: time and pixel frames of each rank's part, with its halo.
    relative_error: error of all parts together against the whole.
    """

    latents: int
    halo: int
    whole_seconds: float
    part_seconds: list[float]
    part_frames: list[int]
    relative_error: float

    @property
    def saved_seconds(self) -> float:
        """Time that ranks save, until the slowest one has finished."""
        return self.whole_seconds - max(self.part_seconds)


@torch.no_grad()
def time_encoding(
    config: AutoencoderConfig,
    *,
    latents: int,
    ranks: int,
    size: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> EncodeTiming:
    """Time the encoding of random pixels with random weights. The parts of all ranks are timed one after the other.

    latents: latent frames of the clip. ranks: number of ranks, a divisor of `latents`. size: height and width in
    pixels.
    """
    torch.manual_seed(0)
    autoencoder = Autoencoder(config).to(device, dtype).eval()
    scale, halo = config.scale_factor_temporal, temporal_lookback(config)
    whole = encode_window(0, latents, 0, temporal_scale=scale)
    share = latents // ranks
    parts = [encode_window(r * share, (r + 1) * share, halo, temporal_scale=scale) for r in range(ranks)]
    video = torch.rand(1, 3, whole.num_frames, *size, device=device, dtype=dtype) * 2 - 1

    def encode(window: EncodeWindow) -> tuple[Tensor, float]:
        wait_for([device])
        start = time.perf_counter()
        encoded = encode_latents(autoencoder, video[:, :, window.first_frame : window.end_frame], window)
        wait_for([device])
        return encoded, time.perf_counter() - start

    encode(encode_window(0, min(latents, 8), 0, temporal_scale=scale))  # so that cuDNN has chosen its algorithms
    expected, whole_seconds = encode(whole)
    results = [encode(part) for part in parts]
    result = torch.cat([encoded for encoded, _ in results], dim=2)
    return EncodeTiming(
        latents=latents,
        halo=halo,
        whole_seconds=whole_seconds,
        part_seconds=[seconds for _, seconds in results],
        part_frames=[part.num_frames for part in parts],
        relative_error=float((result - expected).norm() / expected.norm()),
    )
