"""A warning is given for pictures that a model's autoencoder cannot hold, and for no others."""

from __future__ import annotations

import random
import warnings
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from longvideo.infer.beginning import BeginningChoice
from longvideo.infer.pipeline import StreamingPipeline
from longvideo.infer.reconstruction import LEAST_PSNR, reconstruction_psnr, reconstruction_warning
from longvideo.pixels import to_uint8
from longvideo.shapeworld.batch import SceneBatch
from longvideo.shapeworld.render import render
from longvideo.shapeworld.world import sample_scene

HEIGHT, WIDTH = 128, 224
OWN_LEAST = 34.0
"""Least PSNR of tiny for pictures of ShapeWorld, dB: 34.6 of 500 held-out scenes."""


@cache
def tiny() -> StreamingPipeline:
    return StreamingPipeline.from_pretrained("tiny", device="cpu", dtype=torch.float32)


def shapeworld(seed: int) -> Tensor:
    """Return a frame of a held-out scene, uint8 [H, W, 3]."""
    times = torch.tensor([[4 * random.Random(seed).random()]], dtype=torch.float64)
    return to_uint8(render(SceneBatch.from_scenes([sample_scene(seed, split="heldout")]), times))[0, 0]


def foreign(name: str) -> Tensor:
    """Return a picture unlike ShapeWorld, uint8 [H, W, 3]."""
    x, y = np.arange(WIDTH) / (WIDTH - 1), np.arange(HEIGHT)[:, None] / (HEIGHT - 1)
    values = np.random.default_rng(0).random((HEIGHT, WIDTH, 3))
    if name == "gradient":
        values = np.stack(np.broadcast_arrays(x, y, 1 - x), axis=-1)
    if name == "spectrum of a photograph":  # amplitudes fall with the frequency
        frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.fftfreq(WIDTH))
        frequency[0, 0] = 1
        filtered = np.fft.ifft2(np.fft.fft2(values, axes=(0, 1)) / frequency[..., None], axes=(0, 1)).real
        values = (filtered - filtered.min()) / np.ptp(filtered)
    return torch.from_numpy((255 * values).astype(np.uint8))


def warned(pixels_HWC: Tensor) -> list[str]:
    """Return the warnings of a picture's first latent."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        BeginningChoice(pixels_HWC).encode(tiny().models)
    return [str(warning.message) for warning in caught]


def test_held_out_pictures_of_shapeworld_never_warn() -> None:
    models = tiny().models
    for seed in range(12):
        picture = shapeworld(seed)
        latent = models.encoder.encode(picture[None])
        assert reconstruction_psnr(models.decoder, picture[None], latent) > OWN_LEAST, seed
    assert warned(shapeworld(0)) == []


@pytest.mark.parametrize("name", ["noise", "gradient", "spectrum of a photograph"])
def test_a_picture_unlike_shapeworld_warns_with_its_error_and_the_data(name: str) -> None:
    models, picture = tiny().models, foreign(name)
    latent = models.encoder.encode(picture[None])
    decoded = models.decoder.plain(latent)[0, 0].double()
    expected = 10 * torch.log10(255**2 / (decoded - picture.double()).square().mean()).item()
    assert expected < LEAST_PSNR - 5
    assert reconstruction_psnr(models.decoder, picture[None], latent) == pytest.approx(expected)
    assert warned(picture) == [
        "the picture comes back from the model's autoencoder, which was trained on ShapeWorld, with a PSNR of"
        f" {expected:.1f} dB, below 30 dB; the video may not look like it"
    ]


def test_the_data_is_left_out_where_it_is_unknown() -> None:
    models = replace(tiny().models, settings=replace(tiny().models.settings, trained_on=""))
    picture = foreign("noise")
    message = reconstruction_warning(models, picture[None], models.encoder.encode(picture[None]), name="the clip")
    assert message is not None and message.startswith("the clip comes back from the model's autoencoder with a PSNR")


def test_a_clip_is_compared_frame_by_frame() -> None:
    models = tiny().models
    times = torch.arange(9, dtype=torch.float64)[None] / 24
    frames = to_uint8(render(SceneBatch.from_scenes([sample_scene(3, split="heldout")]), times))[0]
    latents = models.encoder.encode(frames)
    assert reconstruction_psnr(models.decoder, frames, latents) > OWN_LEAST
    assert reconstruction_psnr(models.decoder, frames.flip(0), latents) < OWN_LEAST
