"""LUQ gives powers of two whose mean over draws is exact, below the smallest of them too."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longvideo.kernels.nvfp4 import draws
from longvideo.kernels.nvfp4.luq import quantize_luq_exact


def draw_for(x: Tensor, seed: int = 0) -> Tensor:
    return draws.uniform(torch.tensor(seed), x.shape)


def test_the_mean_over_draws_is_exact_for_each_element() -> None:
    # in units of alpha, since the largest magnitude is 64
    magnitudes = torch.tensor(
        [64.0, 0.0, 0.01, 0.3, 0.99, 1.0, 1.2, 1.999, 2.0, 3.1, 7.0, 12.0, 20.0, 33.0, 50.0, 63.0]
    )
    x = torch.where(torch.arange(16) % 2 == 0, magnitudes, -magnitudes) * 0.37
    count = 2**16
    table = x.expand(count, -1)
    operand = quantize_luq_exact(table, draw_for(table), dtype=torch.float32)
    values = (operand.values * operand.tensor_scale).double()
    standard_error = values.std(0) / math.sqrt(count)
    assert ((values.mean(0) - x.double()).abs() <= 4 * standard_error + 1e-5).all()


def test_values_are_zero_or_the_neighboring_powers_of_two_with_the_sign_of_x() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).mul(2).exp()
    x = x * torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0)
    operand = quantize_luq_exact(x, draw_for(x))
    assert operand.values.dtype == torch.bfloat16
    assert set(operand.values.abs().unique().tolist()) == {0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0}
    assert operand.tensor_scale == x.abs().max() / 64
    scaled = (x / operand.tensor_scale).double()
    lower = torch.where(scaled.abs() < 1, 0.0, torch.exp2(torch.floor(torch.log2(scaled.abs()))))
    upper = torch.where(scaled.abs() < 1, 1.0, 2 * lower)
    values = operand.values.double()
    assert ((values.abs() == lower) | (values.abs() == upper)).all()
    assert (values * scaled >= 0).all()


def test_powers_of_two_are_kept_whatever_is_drawn() -> None:
    x = torch.tensor([64.0, -32.0, 16.0, 8.0, -4.0, 2.0, 1.0, 0.0]).repeat(4096, 1)
    operand = quantize_luq_exact(x, draw_for(x))
    assert torch.equal(operand.values.float() * operand.tensor_scale, x)


def test_a_zero_tensor_stays_zero() -> None:
    operand = quantize_luq_exact(torch.zeros(3, 4), draw_for(torch.zeros(3, 4)))
    assert (operand.values == 0).all() and torch.isfinite(operand.tensor_scale)
