"""The differentiable gradient estimator is the derivative of its smooth function in every interval of E2M1."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longvideo.kernels.nvfp4 import dge, reference
from longvideo.kernels.nvfp4.format import E2M1_VALUES, Rule

INTERVALS = list(zip(E2M1_VALUES[:-1], E2M1_VALUES[1:], strict=True))


def smooth(x: Tensor, lower: float, upper: float) -> Tensor:
    """Equation 7 in the interval from lower to upper, float64, k = 5."""
    width = upper - lower
    t = 2 * (x - lower) / width - 1
    return lower + width / 2 * (1 + t.sign() * t.abs() ** (1 / 5))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("lower", "upper"), INTERVALS)
def test_the_derivative_is_that_of_equation_eight_and_of_finite_differences(
    lower: float, upper: float, sign: int
) -> None:
    # not the ends, where the derivative belongs to the next interval
    x = torch.linspace(lower, upper, 203, dtype=torch.float64)[1:-1]
    width = upper - lower
    expected = (abs(2 * (x - lower) / width - 1) ** (1 / 5 - 1) / 5).clamp_max(3.0)
    result = dge.derivative((sign * x).float())
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-6)
    step = 1e-6 * width
    slope = (smooth(x + step, lower, upper) - smooth(x - step, lower, upper)) / (2 * step)
    uncapped = expected < 3
    torch.testing.assert_close(result.double()[uncapped], slope[uncapped], rtol=1e-4, atol=1e-6)
    assert result.min() >= 0.2 and result.max() == 3.0 and (~uncapped).sum() < 10


def test_the_ends_and_clipped_values_have_the_smallest_derivative() -> None:
    x = torch.tensor([0.0, 0.5, 2.0, 4.0, 6.0, 6.4, -6.4])
    torch.testing.assert_close(dge.derivative(x), torch.full((7,), 0.2))


@pytest.mark.parametrize("rule", [Rule.STATIC6, Rule.STATIC4, Rule.ADAPTIVE])
@pytest.mark.parametrize("tile_rows", [1, 16])
def test_a_weight_has_the_derivative_at_its_scaled_value(rule: Rule, tile_rows: int) -> None:
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    quantized = reference.quantize(weight, rule, tile_rows=tile_rows)
    scale = (quantized.scales.double() * quantized.tensor_scale).repeat_interleave(16, -1)
    result = dge.weight_derivative(weight, rule, tile_rows=tile_rows)
    expected = dge.derivative((weight.double() / scale).float())
    # next to an end of an interval the last bit decides which side a value is on, and both sides have 1/k
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-5)


def test_a_group_of_zeros_has_a_finite_derivative() -> None:
    weight = torch.zeros(16, 16)
    weight[0, 0] = 1.0
    assert torch.isfinite(dge.weight_derivative(weight, Rule.ADAPTIVE, tile_rows=1)).all()
