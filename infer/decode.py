"""Turn latent chunks into pixels, in order, carrying the decoder's state from chunk to chunk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor

from longvideo.vae.autoencoder import Autoencoder
from longvideo.vae.streaming import StreamingDecoder

SMALL_GRID = 512
"""Latent pixels of a frame, up to which a CPU decodes the frames of a chunk together."""


class ChunkDecoder:
    """Decode the chunks of one video (or of a batch) one after the other, and then those of the next.

    On CUDA it works on streams of its own, on the autoencoder's device, which may be another than the latents', and on
    `first_device` where the two share the work; frames become uint8 there and cross in pinned memory. Only latents that
    kept frames need are decoded.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        *,
        batch: int,
        height: int,
        width: int,
        chunk_latents: int,
        first_device: torch.device | None = None,
        first_share: float = 0.0,
    ) -> None:
        """height, width: of the latents; chunk_latents: latent frames of a chunk.

        first_share: of the decoder's work, what `first_device` does; 0 leaves all of it to the autoencoder's device.
        """
        device = autoencoder.post_quant_conv.weight.device
        self._scale = autoencoder.config.scale_factor_temporal
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        devices = None
        if first_share:
            assert first_device is not None
            devices = (first_device, device)
        is_small = device.type == "cpu" and height * width <= SMALL_GRID
        with self._own_streams(device, *(devices or ())):
            self._decoder = StreamingDecoder(
                autoencoder,
                batch=batch,
                height=height,
                width=width,
                latents_per_step=chunk_latents if is_small else 1,
                devices=devices,
                first_share=first_share,
            )

    def warm_up(self) -> None:
        """Compile and record on CUDA what the first video would wait for, and begin a new one."""
        with self._own_streams(*self._decoder.devices):
            self._decoder.warm_up()

    def reset(self) -> None:
        """Begin a new video."""
        with self._own_streams(*self._decoder.devices):
            self._decoder.restore(())

    @torch.inference_mode()
    def decode(self, latents: Tensor, num_frames: int, *, ready: torch.cuda.Event | None = None) -> np.ndarray:
        """Decode normalised latents [B, C, T, H, W]; return the first frames, uint8 [B, num_frames, H, W, 3].

        ready: on CUDA, what to wait for before the latents are read; see `mark_ready`.
        """
        latents = latents[:, :, : self._latents_for(num_frames)]
        with self._own_streams(latents.device, *self._decoder.devices):
            if ready is not None:
                stream = self._streams[latents.device]
                stream.wait_event(ready)
                latents.record_stream(stream)
            pixels = self._decoder.decode(latents)[:, :num_frames]
            if pixels.device.type != "cuda":
                return pixels.contiguous().numpy()
            # pinned: a pageable copy would stop this stream and the one that denoises
            host = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
            host.copy_(pixels, non_blocking=True)
        self._streams[pixels.device].synchronize()
        return host.numpy()

    @contextmanager
    def _own_streams(self, *devices: torch.device) -> Iterator[None]:
        """Make a stream of this decoder the current one on each CUDA device; it begins after what is under way there.

        Latents leave their device on such a stream too, without waiting for the next chunk.
        """
        with ExitStack() as stack:
            for device in devices:
                if device.type != "cuda":
                    continue
                if device not in self._streams:
                    self._streams[device] = torch.cuda.Stream(device)
                    self._streams[device].wait_stream(torch.cuda.current_stream(device))
                stack.enter_context(torch.cuda.stream(self._streams[device]))
            yield

    def _latents_for(self, num_frames: int) -> int:
        if self._decoder.opened:
            return -(-num_frames // self._scale)
        return 1 + -(-(num_frames - 1) // self._scale)  # the first latent is one frame


def mark_ready(latents: Tensor) -> torch.cuda.Event | None:
    """Note that latents on CUDA are complete once the current stream gets here."""
    if latents.device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(latents.device))
    return event
