"""Turn latent chunks into pixels, in order, carrying the decoder's state from chunk to chunk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

State = TypeVar("State")


class LatentDecoder(Protocol[State]):
    """What is needed of an autoencoder; `longvideo.vae.autoencoder.Autoencoder` is one."""

    def denormalize(self, z: Tensor) -> Tensor: ...

    def decode(self, latents_BCTHW: Tensor, state: State | None = None) -> tuple[Tensor, State]: ...


@dataclass(frozen=True)
class LatentChunk:
    """Normalised latents [B, C, T, H, W], how many pixel frames of them are kept, and when they were ready on CUDA."""

    latents: Tensor
    num_frames: int
    ready: torch.cuda.Event | None = None

    @classmethod
    def made(cls, latents: Tensor, num_frames: int) -> LatentChunk:
        """Note on the current stream of the latents' device that they are complete from here on."""
        if latents.device.type != "cuda":
            return cls(latents, num_frames)
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(latents.device))
        return cls(latents, num_frames, ready)


class ChunkDecoder:
    """Decode the chunks of one video one after the other into uint8 [B, T, H, W, 3] in host memory.

    On CUDA it works on a stream of its own, on the autoencoder's device, which may be another than the latents'; frames
    become uint8 there and cross in pinned memory. Only latents that kept frames need are decoded.
    """

    def __init__(self, autoencoder: LatentDecoder, *, device: torch.device, dtype: torch.dtype, temporal_scale: int):
        self._autoencoder = autoencoder
        self._device = device
        self._dtype = dtype
        self._temporal_scale = temporal_scale
        self._state: object | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @torch.inference_mode()
    def decode(self, chunk: LatentChunk) -> np.ndarray:
        """Return the kept frames of the next chunk."""
        latents = chunk.latents[:, :, : self._latents_for(chunk.num_frames)]
        if self._stream is None:
            return self._pixels(latents, chunk.num_frames).cpu().numpy()
        if chunk.ready is not None:
            self._stream.wait_event(chunk.ready)
            latents.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            pixels = self._pixels(latents, chunk.num_frames)
            # pinned: a pageable copy would stop this stream and the one that denoises
            host = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
            host.copy_(pixels, non_blocking=True)
        self._stream.synchronize()
        return host.numpy()

    def decode_all(self, chunks: Iterator[LatentChunk]) -> Iterator[np.ndarray]:
        """Decode chunks as they come, and close their iterator at the end."""
        try:
            for chunk in chunks:
                yield self.decode(chunk)
        finally:
            close = getattr(chunks, "close", None)
            if close is not None:
                close()

    def _pixels(self, latents: Tensor, num_frames: int) -> Tensor:
        latents = self._autoencoder.denormalize(latents.to(self._device, self._dtype, non_blocking=True))
        video_BCTHW, self._state = self._autoencoder.decode(latents, self._state)
        return to_uint8(video_BCTHW[:, :, :num_frames])

    def _latents_for(self, num_frames: int) -> int:
        if self._state is None:  # the first latent is one frame
            return 1 - (1 - num_frames) // self._temporal_scale
        return -(-num_frames // self._temporal_scale)


def to_uint8(video_BCTHW: Tensor) -> Tensor:
    """Map [-1, 1] to 0..255 with rounding: [B, 3, T, H, W] -> uint8 [B, T, H, W, 3], contiguous."""
    pixels = video_BCTHW.float().add(1).mul(127.5).round_().clamp_(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 4, 1).contiguous()
