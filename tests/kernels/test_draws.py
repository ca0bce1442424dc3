"""Draws are uniform, independent between seeds and streams, and a function of both."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from longvideo.kernels.nvfp4 import draws

COUNT = 2**16


def uniform(seed: int, stream: int = 0, count: int = COUNT) -> Tensor:
    return draws.uniform(torch.tensor(seed), torch.Size((count,)), stream=stream)


# layers begin with the seeds 0, 1, 2, ...; later seeds have 62 random bits
@pytest.mark.parametrize("seed", [0, 1, 2, 2**32, 2**61 + 12345])
def test_draws_are_uniform_in_the_unit_interval(seed: int) -> None:
    draw = uniform(seed)
    assert draw.dtype == torch.float32 and draw.min() >= 0 and draw.max() < 1
    counts = torch.histc(draw, 256, 0, 1)
    chi_square = ((counts - COUNT / 256).square() / (COUNT / 256)).sum().item()
    # of 255 degrees of freedom: mean 255, standard deviation sqrt(510)
    assert abs(chi_square - 255) < 5 * math.sqrt(510)
    assert draw.unique().numel() > 0.99 * COUNT


@pytest.mark.parametrize(
    ("first", "second"),
    [((0, 0), (1, 0)), ((0, 0), (2**32, 0)), ((5, 0), (5, 1)), ((5, 1), (6, 0)), ((2**61, 0), (2**61 + 1, 0))],
)
def test_seeds_and_streams_have_unrelated_draws_at_every_shift(first: tuple[int, int], second: tuple[int, int]) -> None:
    left, right = uniform(*first) - 0.5, uniform(*second) - 0.5
    spectrum = torch.fft.rfft(left) * torch.fft.rfft(right).conj()
    correlation = torch.fft.irfft(spectrum, COUNT) / COUNT * 12
    assert correlation.abs().max() < 6 / math.sqrt(COUNT)


def test_neighboring_draws_are_unrelated() -> None:
    draw = uniform(3) - 0.5
    spectrum = torch.fft.rfft(draw).abs().square()
    correlation = torch.fft.irfft(spectrum, COUNT)[1:] / COUNT * 12
    assert correlation.abs().max() < 6 / math.sqrt(COUNT)


def test_a_draw_depends_on_seed_stream_and_index_alone() -> None:
    assert torch.equal(uniform(7, 1), uniform(7, 1))
    assert torch.equal(uniform(7, 1, count=100), uniform(7, 1)[:100])
    table = draws.uniform(torch.tensor([7, 8])[0], torch.Size((4, 25)), stream=1)
    assert torch.equal(table.flatten(), uniform(7, 1, count=100))


def test_signs_are_balanced_and_unrelated() -> None:
    signs = torch.stack([draws.signs(torch.tensor(seed), 128) for seed in range(2000)])
    assert signs.unique().tolist() == [-1, 1]
    assert (signs.mean(0).abs() < 5 / math.sqrt(2000)).all()
    products = signs.t() @ signs / 2000
    assert (products - torch.eye(128)).abs().max() < 6 / math.sqrt(2000)


def test_too_many_draws_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="expected fewer than 2"):
        draws.uniform(torch.tensor(0, device="meta"), torch.Size((2**16, 2**15)))
