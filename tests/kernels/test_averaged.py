"""Rounding toward an average equals algorithm 1 of arXiv 2502.20853, value by value."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from longvideo.kernels.nvfp4.averaged import round_toward_average
from longvideo.kernels.nvfp4.format import E2M1_VALUES, GROUP, Rule
from longvideo.kernels.nvfp4.reference import dequantize, quantize


def by_definition(x: Tensor, average: Tensor, rule: Rule, tile_rows: int) -> Tensor:
    packed = quantize(x, rule, tile_rows=tile_rows)
    scales = (packed.scales.double() * packed.tensor_scale.double()).repeat_interleave(GROUP, -1)
    result = torch.zeros_like(x, dtype=torch.float64)
    for place in zip(*torch.nonzero(torch.ones_like(x), as_tuple=True), strict=True):
        scale = float(scales[place])
        value, mean = float(x[place]) / scale, float(average[place]) / scale
        below = max(number for number in E2M1_VALUES if number <= abs(value))
        above = min((number for number in E2M1_VALUES if number > abs(value)), default=below)
        below, above = (math.copysign(number, value) for number in (below, above))
        result[place] = scale * (above if abs(mean - above) < abs(mean - below) else below)
    return result


def represented(x: Tensor, average: Tensor, rule: Rule, tile_rows: int) -> Tensor:
    exact = round_toward_average(x, average, rule, tile_rows=tile_rows, dtype=torch.float32)
    return exact.values.double() * exact.tensor_scale.double()


@pytest.mark.parametrize("rule", [Rule.STATIC6, Rule.STATIC4, Rule.ADAPTIVE])
@pytest.mark.parametrize("tile_rows", [1, GROUP])
def test_each_value_takes_the_neighbor_nearer_to_its_average(rule: Rule, tile_rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 48, generator=generator)
    average = x + 0.3 * torch.randn(32, 48, generator=generator)
    expected = by_definition(x, average, rule, tile_rows)
    got = represented(x, average, rule, tile_rows)
    assert torch.allclose(got, expected, rtol=1e-6, atol=0)
    nearest = dequantize(quantize(x, rule, tile_rows=tile_rows), torch.float32).double()
    assert 0.02 < float(((got - nearest).abs() > 1e-6).double().mean()) < 0.5


def test_an_average_that_is_the_value_rounds_to_nearest() -> None:
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    nearest = dequantize(quantize(x, Rule.STATIC6, tile_rows=GROUP), torch.float32).double()
    assert torch.allclose(represented(x, x, Rule.STATIC6, GROUP), nearest, rtol=1e-6, atol=0)


def test_a_magnitude_above_the_largest_number_and_a_zero_group_stay_what_they_are() -> None:
    x = torch.cat((torch.full((1, GROUP), 0.1), torch.zeros(1, GROUP)), dim=1)
    x[0, 0] = 6.0
    got = represented(x, x * 0.5, Rule.STATIC6, 1)
    assert float(got[0, 0]) == pytest.approx(6.0, rel=1e-6)
    assert not got[0, GROUP:].any()
