"""A tiny decoder for streaming: it keeps its state at fixed addresses, and a GPU replays a step as one graph."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.errors import UserError
from longvideo.pixels import to_uint8
from longvideo.streaming.recording import GraphRecorder

if TYPE_CHECKING:
    from longvideo.streaming.decoder_convolutions import Grid
    from longvideo.vae.layers import State
    from longvideo.vae.tae import TinyDecoder


class TinyStreamingDecoder:
    """Decoder of a batch of videos, in order; see `VideoDecoder`.

    On CUDA a whole step of later latent frames is recorded by `warm_up` and replayed from then on; an
    opening frame and shorter steps are not recorded.
    """

    def __init__(self, decoder: TinyDecoder, grid: Grid, *, recorder: GraphRecorder | None = None) -> None:
        """Allocate the state.

        grid: sizes of the latents of a whole step of later latent frames. recorder: recorder of the graph; None means
        one of its own.
        """
        weight = next(decoder.parameters())
        self._decoder, self._dtype = decoder, weight.dtype
        self.shape, self.latents_per_step = (grid.batch, decoder.config.z_dim, grid.height, grid.width), grid.frames
        self.devices, self.opened = (weight.device,), False
        self._kept = decoder.blank_state(grid.batch, grid.height, grid.width)
        self._recorder = recorder
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs = weight.new_zeros(*self.shape[:2], grid.frames, *self.shape[2:])
        self._pixels: Tensor | None = None

    @torch.inference_mode()
    def decode(self, latents_BzTHW: Tensor) -> Tensor:
        """Return uint8 frames [B, T, H, W, 3] of the next latent frames.

        The first latent frame of a video is one frame, a later one four. Raises UserError for latents of another shape.
        """
        batch, channels, num_latents, height, width = latents_BzTHW.shape
        if (batch, channels, height, width) != self.shape or not num_latents:
            own = self.shape
            raise UserError(
                f"latents are {list(latents_BzTHW.shape)}; expected [{own[0]}, {own[1]}, 1 or more, {own[2]}, {own[3]}]"
            )
        latents_BzTHW = latents_BzTHW.to(self.devices[0], self._dtype, non_blocking=True)
        parts = []
        if not self.opened:
            parts.append(self._run(latents_BzTHW[:, :, :1])[:, -1:])
            latents_BzTHW, self.opened = latents_BzTHW[:, :, 1:], True
        parts += [self._step(part) for part in latents_BzTHW.split(self.latents_per_step, dim=2) if part.shape[2]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile and record the work of a CUDA device, and begin a new video."""
        device = self.devices[0]
        self.begin()
        if device.type != "cuda":
            return
        self._run(self._inputs)
        self._run(self._inputs[:, :, :1])
        recorder = self._recorder or GraphRecorder(device)
        self._graph, self._pixels = recorder.record(partial(self._run, self._inputs))
        self.begin()
        torch.cuda.empty_cache()

    def state(self) -> State:
        """Return copies of the frames that the memory blocks keep; empty before the first frame of a video."""
        return tuple(frame.clone() for frame in self._kept) if self.opened else ()

    @torch.inference_mode()
    def begin(self, *, inside: bool = False) -> None:
        """Begin a new video. inside: whether later latent frames come first, after frames of zeros."""
        self.opened = inside
        for frame in self._kept:
            frame.zero_()

    @torch.inference_mode()
    def restore(self, state: State) -> None:
        """Continue after the frames of a `state`; () begins a new video."""
        self.begin(inside=bool(state))
        for frame, kept in zip(self._kept, state, strict=False):
            frame.copy_(kept)

    def _step(self, latents_BzTHW: Tensor) -> Tensor:
        if self._graph is None or latents_BzTHW.shape != self._inputs.shape:
            return self._run(latents_BzTHW)
        assert self._pixels is not None
        self._inputs.copy_(latents_BzTHW)
        self._graph.replay()
        return self._pixels.clone()

    def _run(self, latents_BzTHW: Tensor) -> Tensor:
        """Return the frames of later latent frames, and keep the state."""
        video_BCTHW, state = self._decoder.decode(latents_BzTHW, self._kept)
        for frame, kept in zip(self._kept, state, strict=True):
            frame.copy_(kept)
        return to_uint8(video_BCTHW)
