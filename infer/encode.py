"""Encode given frames, a first picture or the footage that a video continues, as latents."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.pixels import from_uint8
from longvideo.vae.tae import TinyEncoder

if TYPE_CHECKING:
    from collections.abc import Callable

    from longvideo.vae.autoencoder import Autoencoder


class FrameEncoder:
    """The encoder of a model, loaded when it is first used."""

    def __init__(self, load: Callable[[], Autoencoder | TinyEncoder], *, exists: bool = True) -> None:
        """load: function that loads the encoder, or returns a loaded one. exists: whether the model has an encoder."""
        self.exists = exists
        self._load, self._lock = load, threading.Lock()
        self._encoder: Autoencoder | TinyEncoder | None = None

    @torch.inference_mode()
    def encode(self, frames_THWC: Tensor) -> Tensor:
        """Return the normalized latents of the opening of a video, float32 [1, C, 1 + n, h, w].

        They are on the device of the encoder. frames_THWC: uint8, 1 + 4 n frames of the size of the video; a picture is
        one frame. Raises CheckpointError if the model has no encoder.
        """
        from longvideo.data.encoding import encode_frames
        from longvideo.model.chunk_frames import WAN_CHUNKS

        with self._lock:
            if self._encoder is None:
                self._encoder = self._load()
        if not isinstance(self._encoder, TinyEncoder):
            return encode_frames(self._encoder, frames_THWC, chunks=WAN_CHUNKS)
        weight = next(self._encoder.parameters())
        video_BCTHW = from_uint8(frames_THWC.to(weight.device)).permute(3, 0, 1, 2)[None].to(weight.dtype)
        return self._encoder.encode_video(video_BCTHW).float()
