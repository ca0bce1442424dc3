"""Turn latent chunks into pixels, in order, carrying the decoder's state from chunk to chunk."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from longvideo.pixels import to_uint8
from longvideo.vae.autoencoder import Autoencoder
from longvideo.vae.layers import State


class ChunkDecoder:
    """Decode the chunks of one video (or of a batch) one after the other.

    On CUDA it works on a stream of its own, on the autoencoder's device, which may be another than the latents'; frames
    become uint8 there and cross in pinned memory. Only latents that kept frames need are decoded.
    """

    def __init__(self, autoencoder: Autoencoder) -> None:
        weight = autoencoder.post_quant_conv.weight
        self._autoencoder = autoencoder
        self._device, self._dtype = weight.device, weight.dtype
        self._state: State | None = None
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._source_stream: torch.cuda.Stream | None = None

    @torch.inference_mode()
    def decode(self, latents: Tensor, num_frames: int, *, ready: torch.cuda.Event | None = None) -> np.ndarray:
        """Decode normalised latents [B, C, T, H, W]; return the first frames, uint8 [B, num_frames, H, W, 3].

        ready: on CUDA, what to wait for before the latents are read; see `mark_ready`.
        """
        latents = latents[:, :, : self._latents_for(num_frames)]
        if self._stream is None:
            return self._pixels(latents, num_frames).numpy()
        source = self._leaving_stream(latents.device)
        if ready is not None:
            source.wait_event(ready)
            latents.record_stream(source)
        with torch.cuda.stream(source), torch.cuda.stream(self._stream):
            pixels = self._pixels(latents, num_frames)
            # pinned: a pageable copy would stop this stream and the one that denoises
            host = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
            host.copy_(pixels, non_blocking=True)
        self._stream.synchronize()
        return host.numpy()

    def _leaving_stream(self, device: torch.device) -> torch.cuda.Stream:
        """Return the stream, on the latents' device, on which they leave it without waiting for the next chunk."""
        assert self._stream is not None
        if device.type != "cuda" or device == self._device:
            return self._stream
        if self._source_stream is None:
            self._source_stream = torch.cuda.Stream(device)
        return self._source_stream

    def _pixels(self, latents: Tensor, num_frames: int) -> Tensor:
        latents = self._autoencoder.denormalize(latents.to(self._device, non_blocking=True)).to(self._dtype)
        video_BCTHW, self._state = self._autoencoder.decode(latents, self._state)
        return to_uint8(video_BCTHW[:, :, :num_frames])

    def _latents_for(self, num_frames: int) -> int:
        scale = self._autoencoder.config.scale_factor_temporal
        if self._state is None:  # the first latent is one frame
            return 1 + -(-(num_frames - 1) // scale)
        return -(-num_frames // scale)


def mark_ready(latents: Tensor) -> torch.cuda.Event | None:
    """Note that latents on CUDA are complete once the current stream gets here."""
    if latents.device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(latents.device))
    return event
