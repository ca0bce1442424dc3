"""Measure whether a model's autoencoder can hold given pixels: compare them with what it decodes from their latents."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.pixels import psnr

if TYPE_CHECKING:
    from longvideo.infer.generation import Models
    from longvideo.streaming.decoders import DecoderModel

LEAST_PSNR = 30.0
"""Peak signal-to-noise ratio in dB below which a warning is given. With tiny, 500 held-out pictures of ShapeWorld have
at least 34.6 dB, and 24 photographs and drawings of other origin at most 24.6 dB."""


@torch.inference_mode()
def reconstruction_psnr(decoder: DecoderModel, frames_THWC: Tensor, latents_BCTHW: Tensor) -> float:
    """Return the peak signal-to-noise ratio of frames that are decoded from their latents, dB.

    frames_THWC: uint8, of the size of the video; 1 + 4 n of them, as the opening of a video. latents_BCTHW: their
    normalized latents, with B = 1, on any device. All frames are decoded at once, so pass few of a long clip.
    """
    decoded_THWC = decoder.plain(latents_BCTHW.to(decoder.device))[0].cpu()
    return psnr(((decoded_THWC.float() - frames_THWC.cpu().float()).square().mean(dtype=torch.float64).item(),))


def reconstruction_warning(models: Models, frames_THWC: Tensor, latents_BCTHW: Tensor, *, name: str) -> str | None:
    """Return a warning about frames that the model's autoencoder cannot hold, or None.

    name: what the frames are, such as "the picture". Frames and latents are those of `reconstruction_psnr`.
    """
    value = reconstruction_psnr(models.decoder, frames_THWC, latents_BCTHW)
    if value >= LEAST_PSNR:
        return None
    data = models.settings.trained_on
    reason = f", which was trained on {data}," if data else ""
    return (
        f"{name} comes back from the model's autoencoder{reason} with a PSNR of {value:.1f} dB, below"
        f" {LEAST_PSNR:g} dB; the video may not look like it"
    )
