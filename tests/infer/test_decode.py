"""The decoder of chunks: chunks of any length, the next video, and two devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longvideo.checkpoint.folder import ModelFolder
from longvideo.infer.decode import ChunkDecoder, mark_ready
from longvideo.pixels import to_uint8
from longvideo.streaming.decoder_convolutions import Grid
from longvideo.streaming.decoders import WanDecoderModel
from longvideo.vae.autoencoder import Autoencoder

CHUNK = 3
HEIGHT, WIDTH = 2, 4


@pytest.fixture(scope="module")
def autoencoder(model_folder: Path) -> Autoencoder:
    return ModelFolder.open(model_folder).load_vae(dtype=torch.float32)


def latents(channels: int, *, seed: int = 0) -> Tensor:
    return torch.randn(2, channels, 8, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))


def decoded(decoder: ChunkDecoder, z: Tensor, num_frames: int) -> np.ndarray:
    """Decode the first frames of a video as a pipeline does: the opening frame, then chunk by chunk."""
    frames, first = [], 0
    for count in [1, CHUNK - 1, *[CHUNK] * 9]:
        kept = min(num_frames, 1 if first == 0 else 4 * count)
        frames.append(decoder.decode(z[:, :, first : first + count], kept, ready=mark_ready(z)))
        first, num_frames = first + count, num_frames - kept
        if not num_frames:
            return np.concatenate(frames, axis=1)
    raise AssertionError


def whole(autoencoder: Autoencoder, z: Tensor) -> np.ndarray:
    with torch.no_grad():
        return to_uint8(autoencoder.decode(autoencoder.denormalize(z))[0]).numpy()


def decoder_of(autoencoder: Autoencoder, **split: Any) -> ChunkDecoder:
    model = WanDecoderModel(autoencoder, name="test")
    return ChunkDecoder(model, Grid(2, CHUNK, HEIGHT, WIDTH), **split)


@pytest.mark.parametrize("num_frames", [1, 5, 7, 29])
def test_chunks_are_the_beginning_of_the_video_decoded_at_once(autoencoder: Autoencoder, num_frames: int) -> None:
    z = latents(autoencoder.config.z_dim)
    result, expected = decoded(decoder_of(autoencoder), z, num_frames), whole(autoencoder, z)[:, :num_frames]
    assert result.dtype == np.uint8 and result.shape == (2, num_frames, 16 * HEIGHT, 16 * WIDTH, 3)
    assert np.abs(result.astype(int) - expected).max() <= 1 and (result != expected).mean() < 1e-3


def test_the_next_video_does_not_see_the_last_one(autoencoder: Autoencoder) -> None:
    decoder, z = decoder_of(autoencoder), latents(autoencoder.config.z_dim)
    expected = decoded(decoder, z, 29)
    for begin in (decoder.reset, decoder.warm_up):
        begin()
        assert not np.array_equal(decoded(decoder, latents(autoencoder.config.z_dim, seed=1), 10), expected[:, :10])
        begin()
        assert np.array_equal(decoded(decoder, z, 29), expected)


def test_frames_stay_as_they_are_when_more_are_made(autoencoder: Autoencoder) -> None:
    decoder, z = decoder_of(autoencoder), latents(autoencoder.config.z_dim)
    first = decoder.decode(z[:, :, :4], 13)
    kept = first.copy()
    decoder.decode(z[:, :, 4:], 16)
    assert np.array_equal(first, kept)


def test_two_devices_make_what_one_makes(autoencoder: Autoencoder) -> None:
    z = latents(autoencoder.config.z_dim)
    expected = decoded(decoder_of(autoencoder), z, 22)
    split = decoder_of(autoencoder, first_device=torch.device("cpu"), first_share=0.4)
    assert np.array_equal(decoded(split, z, 22), expected)


@pytest.mark.gpu
def test_on_cuda_chunks_are_those_of_the_cpu_and_the_same_every_time(model_folder: Path) -> None:
    on_cpu, on_gpu = (ModelFolder.open(model_folder).load_vae(device=d, dtype=torch.float32) for d in ("cpu", "cuda"))
    z = latents(on_cpu.config.z_dim)
    decoder = decoder_of(on_gpu)
    decoder.warm_up()
    first = decoded(decoder, z.cuda(), 29)
    decoder.reset()
    assert np.array_equal(decoded(decoder, z.cuda(), 29), first)
    assert np.abs(first.astype(int) - whole(on_cpu, z)).mean() < 0.5


@pytest.mark.multigpu
def test_two_gpus_share_the_work_of_one(model_folder: Path) -> None:
    autoencoder = ModelFolder.open(model_folder).load_vae(device="cuda:1", dtype=torch.float32)
    z = latents(autoencoder.config.z_dim).to("cuda:0")
    one = decoder_of(autoencoder)
    two = decoder_of(autoencoder, first_device=torch.device("cuda:0"), first_share=0.4)
    two.warm_up()
    expected = decoded(one, z, 29).astype(int)
    for _ in range(2):
        assert np.abs(decoded(two, z, 29) - expected).mean() < 0.5
        two.reset()
