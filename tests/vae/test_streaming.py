"""The streaming decoder against the autoencoder's own, in pieces of any length, and what it remembers."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import pytest
import torch
from torch import Tensor

from longvideo.checkpoint.folder import ModelFolder
from longvideo.errors import UserError
from longvideo.pixels import to_uint8
from longvideo.vae.streaming import StreamingDecoder, fold_upsampling
from tests.vae.test_autoencoder import latents, ours


@cache
def expected(num_frames: int, seed: int) -> Tensor:
    with torch.no_grad():
        video, _ = ours().decode(ours().denormalize(latents(num_frames, seed=seed)), None)
    return to_uint8(video)


def decoder(latents_per_step: int = 1) -> StreamingDecoder:
    return StreamingDecoder(ours(), batch=2, height=2, width=3, latents_per_step=latents_per_step)


def differing(got: Tensor, wanted: Tensor) -> float:
    """Return the share of values that differ; none may by more than one step of 255."""
    assert got.shape == wanted.shape and got.dtype == torch.uint8
    difference = (got.int() - wanted.int()).abs()
    assert difference.max() <= 1
    return (difference > 0).float().mean().item()


def test_an_upsampling_and_its_convolution_are_one_small_convolution() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 5, 4, 3, generator=generator), torch.randn(7, 5, 3, 3, generator=generator)
    wanted = torch.nn.functional.conv2d(torch.nn.functional.interpolate(x, scale_factor=2), weight, padding=1)
    folded = torch.nn.functional.conv2d(x, fold_upsampling(weight), padding=1).unflatten(1, (2, 2, 7))
    got = torch.empty_like(wanted)
    for a in range(2):
        for b in range(2):
            got[:, :, a::2, b::2] = folded[:, a, b, :, a : a + 4, b : b + 3]
    assert (got - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("pieces", [[5], [1, 4], [2, 3], [1, 1, 1, 1, 1]])
@pytest.mark.parametrize("latents_per_step", [1, 3])
def test_it_makes_the_pixels_of_the_autoencoder(pieces: list[int], latents_per_step: int) -> None:
    wanted, streaming = expected(5, 0), decoder(latents_per_step)
    got = torch.cat([streaming.decode(part) for part in latents(5).split(pieces, dim=2)], dim=1)
    # rounding differs where a value lies half way between two steps
    assert differing(got, wanted) < 1e-3


def test_a_state_can_be_gone_on_from_twice_and_a_video_begun_anew() -> None:
    streaming = decoder()
    first, second, other = latents(3), latents(2, seed=1), latents(2, seed=2)
    streaming.decode(first)
    state = streaming.state()
    once, _ = streaming.decode(second), streaming.decode(other)
    streaming.restore(state)
    assert torch.equal(streaming.decode(second), once)
    streaming.restore(())
    assert differing(streaming.decode(latents(5)), expected(5, 0)) < 1e-3


def test_the_shipped_autoencoder_in_bf16() -> None:
    autoencoder = ModelFolder.open("tiny").load_vae(dtype=torch.bfloat16)
    z = torch.randn(1, autoencoder.config.z_dim, 3, 8, 14, generator=torch.Generator().manual_seed(0))
    exact = ModelFolder.open("tiny").load_vae(dtype=torch.float32)
    with torch.no_grad():
        wanted = to_uint8(exact.decode(exact.denormalize(z), None)[0]).float()
        plain = to_uint8(autoencoder.decode(autoencoder.denormalize(z).bfloat16(), None)[0]).float()
    got = StreamingDecoder(autoencoder, batch=1, height=8, width=14, latents_per_step=2).decode(z).float()
    # folded weights are rounded once more
    assert (got - wanted).norm() < 1.2 * (plain - wanted).norm() < 1e-2 * wanted.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda_it_makes_the_pixels_of_the_cpu(dtype: torch.dtype) -> None:
    autoencoder = deepcopy(ours()).to("cuda", dtype)
    streaming = StreamingDecoder(autoencoder, batch=2, height=2, width=3)
    got = torch.cat([streaming.decode(part.cuda()).cpu() for part in latents(5).split([2, 3], dim=2)], dim=1)
    wanted = expected(5, 0).float()
    assert (got.float() - wanted).norm() < (2e-3 if dtype == torch.float32 else 5e-2) * wanted.norm()


def test_latents_of_another_shape_are_refused() -> None:
    with pytest.raises(UserError, match=r"latents are \[1, 6, 2, 2, 3\], wanted \[2, 6, 1 or more, 2, 3\]"):
        decoder().decode(latents(2, batch=1))
