"""Encode a first picture as a latent frame."""

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


class PictureEncoder:
    """The encoder of a model, loaded when it is first used."""

    def __init__(self, load: Callable[[], Autoencoder | TinyEncoder]) -> None:
        """load: function that loads the encoder, or returns a loaded one."""
        self._load, self._lock = load, threading.Lock()
        self._encoder: Autoencoder | TinyEncoder | None = None

    @torch.inference_mode()
    def encode(self, pixels_HWC: Tensor) -> Tensor:
        """Return the normalized latent of a picture, float32 [1, C, 1, h, w], on the device of the encoder.

        pixels_HWC: uint8, of the size of the video. Raises CheckpointError if the model has no encoder.
        """
        with self._lock:
            if self._encoder is None:
                self._encoder = self._load()
        weight = next(self._encoder.parameters())
        video_BCTHW = from_uint8(pixels_HWC.to(weight.device)).permute(2, 0, 1)[None, :, None].to(weight.dtype)
        if isinstance(self._encoder, TinyEncoder):
            return self._encoder.encode_video(video_BCTHW).float()
        moments_BCTHW, _ = self._encoder.encode(video_BCTHW)
        return self._encoder.normalize(moments_BCTHW.chunk(2, dim=1)[0].float())
