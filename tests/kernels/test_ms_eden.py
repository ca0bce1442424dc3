"""MS-EDEN has hardly any bias over redrawn signs and draws, and less than half of the error of stochastic rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longvideo.kernels.nvfp4 import draws, ms_eden, reference
from longvideo.kernels.nvfp4.codes import decode, unpack
from longvideo.kernels.nvfp4.format import NVFP4Tensor, Rule
from longvideo.kernels.nvfp4.hadamard import random_hadamard
from longvideo.kernels.nvfp4.ms_eden import CLIP, POINTS, SCALE_MAX, quantize_ms_eden

DRAWS = 1000


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def signs(seed: int) -> Tensor:
    return draws.signs(torch.tensor(seed), POINTS)


def draw(x: Tensor, seed: int, operand: int = 0) -> Tensor:
    return draws.uniform(torch.tensor(seed), torch.Size((*x.shape[:-1], x.shape[-1] // 16)), stream=operand + 1)


def rounded(x: Tensor, seed: int, *, operand: int = 0) -> NVFP4Tensor:
    return quantize_ms_eden(x, signs(seed), draw(x, seed, operand))


def undo(rotated: Tensor, seed: int) -> Tensor:
    """Return the vector of which this is the transform."""
    matrix = random_hadamard(torch.eye(POINTS), POINTS, signs=signs(seed))
    return (rotated.unflatten(-1, (-1, POINTS)) @ matrix.t()).flatten(-2)


@pytest.mark.parametrize("x", [gaussian(4, 256), torch.ones(4, 256)], ids=["gaussian", "constant"])
def test_the_bias_of_the_vector_is_below_one_percent(x: Tensor) -> None:
    mean = torch.zeros_like(x)
    for seed in range(DRAWS):
        mean += undo(reference.dequantize(rounded(x, seed)), seed) / DRAWS
    # an error of 10 % per draw leaves 0.3 % after 1000
    assert (mean - x).norm() < 0.01 * x.norm()


def test_the_bias_of_the_inner_product_is_below_one_percent() -> None:
    a = gaussian(256)
    b = 0.5 * a + 0.5 * gaussian(256, seed=1)
    products = []
    for seed in range(DRAWS):
        left, right = (reference.dequantize(rounded(x, seed, operand=i)) for i, x in enumerate((a, b)))
        products.append(left @ right)
    assert abs(torch.stack(products).mean() / (a @ b) - 1) < 0.01


def test_with_fixed_signs_the_bias_would_be_larger() -> None:
    """The tests above can fail: the mean over scales alone keeps the error of rounding to nearest."""
    x = gaussian(4, 256)
    mean = torch.zeros_like(x)
    for seed in range(DRAWS):
        fixed = quantize_ms_eden(x, signs(0), draw(x, seed))
        mean += undo(reference.dequantize(fixed), 0) / DRAWS
    assert (mean - x).norm() > 0.05 * x.norm()


def test_the_squared_error_is_below_half_of_that_of_stochastic_rounding() -> None:
    x = gaussian(64, 512)
    errors = {"ms-eden": 0.0, "stochastic": 0.0}
    for seed in range(8):
        rotated = random_hadamard(x, POINTS, signs=signs(seed))
        stochastic = reference.quantize_exact(rotated, Rule.STATIC6, seed=seed, dtype=torch.float32)
        errors["stochastic"] += (stochastic.values * stochastic.tensor_scale - rotated).square().sum().item()
        errors["ms-eden"] += (reference.dequantize(rounded(x, seed)) - rotated).square().sum().item()
    assert errors["ms-eden"] < 0.5 * errors["stochastic"]


def test_codes_are_nearest_and_scales_are_corrected_by_the_two_nearest_numbers() -> None:
    """The steps of Algorithm 1 in float64, apart from the draw."""
    x = gaussian(3, 256)
    quantized = rounded(x, 5)
    groups = random_hadamard(x, POINTS, signs=signs(5)).double().unflatten(-1, (-1, 16))
    tensor_scale = groups.abs().max() / (CLIP * SCALE_MAX)
    torch.testing.assert_close(quantized.tensor_scale.double(), tensor_scale, rtol=1e-6, atol=0)
    exact = groups.abs().amax(-1) / (CLIP * tensor_scale)
    scale = exact.float().to(torch.float8_e4m3fn).double()
    assert 0.9 * SCALE_MAX < scale.max() <= SCALE_MAX
    scaled = groups / (scale * tensor_scale).unsqueeze(-1)
    values = decode(unpack(quantized.codes)).double().unflatten(-1, (-1, 16))
    grid = decode(torch.arange(16, dtype=torch.uint8)).double()
    best = (scaled.unsqueeze(-1) - grid).abs().amin(-1)
    assert ((scaled - values).abs() <= best + 1e-5).all()
    corrected = scale * scaled.square().sum(-1) / (scaled * values).sum(-1)
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    upper = numbers[torch.searchsorted(numbers, corrected)]
    lower = numbers[torch.searchsorted(numbers, corrected, right=True) - 1]
    stored = quantized.scales.double()
    assert ((stored == upper) | (stored == lower)).all() and (stored == upper).any() and (stored == lower).any()


def test_the_mean_of_a_stochastic_scale_is_exact() -> None:
    x = torch.tensor([0.0, 2.0**-9, 0.9 * 2.0**-9, 0.3, 1.0, 1.03, 17.7, 255.0, 256.0, 300.0, 447.0, 448.0])
    count = 2**14
    table = x.expand(count, -1)
    values = ms_eden._stochastic_e4m3(table, draws.uniform(torch.tensor(3), table.shape)).double()
    standard_error = values.std(0) / count**0.5
    assert ((values.mean(0) - x).abs() <= 4 * standard_error).all()
    assert [len(column.unique()) for column in values.t()] == [1, 1, 2, 2, 1, 2, 2, 2, 1, 2, 2, 1]


def test_fixed_signs_are_refused() -> None:
    with pytest.raises(ValueError, match="biased with fixed signs"):
        quantize_ms_eden(gaussian(128), None, torch.zeros(8))


def test_the_same_seeds_give_the_same_bits_and_others_do_not() -> None:
    x = gaussian(4, 128)
    first, again = rounded(x, 1), rounded(x, 1)
    assert torch.equal(first.codes, again.codes)
    assert torch.equal(first.scales.view(torch.uint8), again.scales.view(torch.uint8))
    other = quantize_ms_eden(x, signs(1), draw(x, 2))
    assert torch.equal(first.codes, other.codes) and not torch.equal(
        first.scales.view(torch.uint8), other.scales.view(torch.uint8)
    )
    assert not torch.equal(first.codes, rounded(x, 2).codes)


@pytest.mark.parametrize("factor", [0.0, 1e-40, 1e-30, 1e30])
def test_extremes_stay_finite(factor: float) -> None:
    x = gaussian(2, 256) * factor
    x[0, :128] = 0
    values = reference.dequantize(rounded(x, 0))
    assert torch.isfinite(values).all() and (values[0, :128] == 0).all()
