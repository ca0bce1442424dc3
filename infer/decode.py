"""Decode latent chunks to pixels, in order; the state of the decoder is carried from chunk to chunk."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    import numpy as np

    from longvideo.streaming.decoder_convolutions import Grid
    from longvideo.streaming.decoders import DecoderModel
    from longvideo.streaming.recording import GraphRecorder

SMALL_GRID = 512
"""Largest number of latent pixels in a frame for which a CPU decodes the frames of a chunk together."""
LAST_LATENTS = 2
"""Number of latent frames of a chunk that are not decoded yet when the next chunk is requested."""


@dataclass(frozen=True)
class PendingFrames:
    """Frames that are being decoded, uint8 [B, T, H, W, 3] in host memory. Without events they are finished."""

    _frames: Tensor
    _nearly: torch.cuda.Event | None = None
    _done: torch.cuda.Event | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether a GPU may still be decoding them."""
        return self._done is not None

    def wait_for_most(self) -> None:
        """Wait until all but the last latent frames are decoded."""
        if self._nearly is not None:
            self._nearly.synchronize()

    def result(self) -> np.ndarray:
        """Wait for the frames and return them."""
        if self._done is not None:
            self._done.synchronize()
        return self._frames.numpy()


@dataclass(frozen=True)
class PendingLatents:
    """Latents that are being copied to host memory. Without an event they are finished."""

    _latents: Tensor
    _done: torch.cuda.Event | None = None

    def result(self) -> Tensor:
        """Wait for the latents and return them."""
        if self._done is not None:
            self._done.synchronize()
        return self._latents


class ChunkDecoder:
    """Decodes the chunks of a video (or of a batch), one after the other, and then those of the next video.

    On CUDA the work runs on streams of the decoder, on the device of its weights and, where two devices share the work,
    on `first_device`; with a `recorder` it runs on the current streams. The latents may be on another device. Frames
    are converted to uint8 on the GPU and copied to pinned memory. Latents that no returned frame needs are not decoded.
    """

    def __init__(
        self,
        model: DecoderModel,
        chunk: Grid,
        *,
        first_device: torch.device | None = None,
        first_share: float = 0.0,
        recorder: GraphRecorder | None = None,
    ) -> None:
        """Allocate the buffers of a decoder.

        chunk: sizes of the latents of a chunk. first_device: device that runs the first layers, if it shares the work.
        first_share: fraction of the work of `first_device`; 0 leaves all of it to the device of the weights.
        recorder: recorder of graphs whose memory the denoiser uses too, so the two must take turns on one stream.
        """
        device, config = model.device, model.config
        self._scale, self._pixels = config.scale_factor_temporal, config.scale_factor_spatial
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._takes_turns = recorder is not None
        sharing = () if first_device is None or not first_share else (first_device,)
        with self._own_streams(device, *sharing):
            self._decoder = model.start(
                step_of(chunk, device), first_device=first_device, first_share=first_share, recorder=recorder
            )

    def warm_up(self) -> None:
        """Compile kernels and record graphs on CUDA, so that the first video does not wait for it; begin a video."""
        with self._own_streams(*self._decoder.devices):
            self._decoder.warm_up()

    def reset(self) -> None:
        """Begin a new video."""
        with self._own_streams(*self._decoder.devices):
            self._decoder.begin()

    @torch.inference_mode()
    def prime(self, chunks: Sequence[Tensor], *, from_start: bool) -> None:
        """Begin after chunks that were decoded before, by decoding them again.

        chunks: their latents, [B, C, T, H, W] each. from_start: whether they are all chunks of the video so far;
        otherwise they are its latest ones, as many as a frame depends on (`longvideo.vae.halo.decode_lookback`).
        """
        with self._own_streams(*self._decoder.devices):
            self._decoder.begin(inside=not from_start)
            for latents in chunks:
                self._decoder.decode(latents.to(self._decoder.devices[0], non_blocking=True))

    @torch.inference_mode()
    def fetch(self, latents: Tensor, *, ready: torch.cuda.Event | None = None) -> PendingLatents:
        """Start to copy latents to host memory, without waiting for CUDA. ready: as in `decode`."""
        with self._own_streams(latents.device):
            if ready is None:
                return PendingLatents(latents)
            stream = self._streams[latents.device]
            stream.wait_event(ready)
            latents.record_stream(stream)
            host = torch.empty(latents.shape, dtype=latents.dtype, pin_memory=True)
            host.copy_(latents, non_blocking=True)
            done = torch.cuda.Event()
            done.record(stream)
        return PendingLatents(host, done)

    def decode(self, latents: Tensor, num_frames: int, *, ready: torch.cuda.Event | None = None) -> np.ndarray:
        """Decode normalized latents [B, C, T, H, W]; return the first frames, uint8 [B, num_frames, H, W, 3].

        ready: on CUDA, the event after which the latents may be read; see `mark_ready`.
        """
        return self.launch(latents, num_frames, ready=ready).result()

    @torch.inference_mode()
    def launch(self, latents: Tensor, num_frames: int, *, ready: torch.cuda.Event | None = None) -> PendingFrames:
        """Start to decode as `decode` does, without waiting for CUDA."""
        latents = latents[:, :, : self._latents_for(num_frames)]
        with self._own_streams(latents.device, *self._decoder.devices):
            if ready is not None:
                stream = self._streams[latents.device]
                stream.wait_event(ready)
                latents.record_stream(stream)
            last = self._decoder.devices[-1]
            if last.type != "cuda":
                return PendingFrames(self._decoder.decode(latents)[:, :num_frames].contiguous())
            # pinned: a copy to pageable memory would stop this stream and the one that denoises
            batch, _, _, height, width = latents.shape
            size = (batch, num_frames, self._pixels * height, self._pixels * width, 3)
            host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            events, first = (torch.cuda.Event(), torch.cuda.Event()), 0
            for part, event in zip(latents.tensor_split((-LAST_LATENTS,), dim=2), events, strict=True):
                if part.shape[2]:
                    pixels = self._decoder.decode(part)[:, : num_frames - first]
                    host[:, first : first + pixels.shape[1]].copy_(pixels, non_blocking=True)
                    first += pixels.shape[1]
                event.record(self._streams[last])
        return PendingFrames(host, *events)

    @contextmanager
    def _own_streams(self, *devices: torch.device) -> Generator[None]:
        """Make a stream of this decoder the current one on each CUDA device.

        A new stream starts after the work that is queued on its device. Latents leave their device on such a stream
        too, so they do not wait for the next chunk. A decoder that takes turns with the denoiser stays on the current
        streams.
        """
        with ExitStack() as stack:
            for device in devices:
                if device.type != "cuda":
                    continue
                if self._takes_turns:
                    self._streams[device] = torch.cuda.current_stream(device)
                    continue
                if device not in self._streams:
                    # a higher priority than denoising: the caller waits for pixels
                    self._streams[device] = torch.cuda.Stream(device, priority=-1)
                    self._streams[device].wait_stream(torch.cuda.current_stream(device))
                stack.enter_context(torch.cuda.stream(self._streams[device]))
            yield

    def _latents_for(self, num_frames: int) -> int:
        """Return the number of latent frames that the next pixel frames need."""
        if self._decoder.opened:
            return -(-num_frames // self._scale)
        return 1 + -(-(num_frames - 1) // self._scale)  # the first latent frame of a video is one pixel frame


def step_of(chunk: Grid, device: torch.device) -> Grid:
    """Return the sizes of the latent frames of a chunk that are decoded together. device: device of the weights."""
    if device.type == "cuda":
        return replace(chunk, frames=LAST_LATENTS)  # a chunk is launched in two parts of this length or longer
    return chunk if chunk.height * chunk.width <= SMALL_GRID else replace(chunk, frames=1)


def decoding_threads() -> int:
    """Return the number of CPU threads of the thread that decodes, and of the one that denoises at the same time."""
    return max(1, torch.get_num_threads() // 2)


def mark_ready(latents: Tensor) -> torch.cuda.Event | None:
    """Return an event after which latents on CUDA are complete: all work queued on the current stream so far."""
    if latents.device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(latents.device))
    return event
