"""Outliers are what exceeds a quantile of the magnitudes, and both products add up to that of the parts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from longvideo.kernels.nvfp4 import reference
from longvideo.kernels.nvfp4.outliers import split_outliers


def heavy_tailed(*shape: int) -> Tensor:
    draws = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=draws) * torch.randn(shape, generator=draws).mul(1.5).exp()


@pytest.mark.parametrize("quantile", [0.5, 0.97, 0.99, 0.999])
def test_values_above_the_quantile_are_clamped_at_it(quantile: float) -> None:
    x = heavy_tailed(40, 50)
    clamped, rest = split_outliers(x, quantile)
    limit = x.abs().flatten().sort().values[math.ceil(quantile * x.numel()) - 1]
    assert torch.equal(clamped, x.clamp(-limit, limit))
    assert (rest != 0).sum() == x.numel() - math.ceil(quantile * x.numel())
    torch.testing.assert_close(clamped + rest, x, rtol=1e-6, atol=0)
    assert (rest[x.abs() <= limit] == 0).all()


def test_all_values_are_kept_at_quantile_one() -> None:
    x = heavy_tailed(40, 50)
    clamped, rest = split_outliers(x, 1.0)
    assert torch.equal(clamped, x) and (rest == 0).all()


def test_the_parts_of_bfloat16_inputs_add_up_to_a_rounding() -> None:
    x = heavy_tailed(40, 50).bfloat16()
    clamped, rest = split_outliers(x, 0.98)
    assert clamped.dtype == rest.dtype == torch.bfloat16
    torch.testing.assert_close(clamped.double() + rest.double(), x.double(), rtol=2.0**-8, atol=0)


def test_both_products_add_up_to_the_exact_product_of_the_dequantized_parts() -> None:
    x, weight = heavy_tailed(40, 64), torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    clamped, rest = split_outliers(x, 0.98)
    left, right = reference.quantize(clamped), reference.quantize(weight)
    result = reference.matmul(left, right) + rest @ reference.dequantize(right).t()
    parts = reference.dequantize(left).double() + rest.double()
    expected = parts @ reference.dequantize(right).double().t()
    bound = 66 * 2.0**-23 * (parts.abs() @ reference.dequantize(right).double().abs().t())
    assert ((result.double() - expected).abs() <= bound).all()
    # what the method is for: fewer values vanish next to an outlier
    errors = [(value - x).square().mean() for value in (parts.float(), reference.dequantize(reference.quantize(x)))]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("quantile", [0.0, -0.1, 1.1])
def test_other_quantiles_are_refused(quantile: float) -> None:
    with pytest.raises(ValueError, match=r"expected a share in \(0, 1\]"):
        split_outliers(torch.ones(4), quantile)
