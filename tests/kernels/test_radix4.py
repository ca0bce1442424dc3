"""Radix-4 FP4 rounds to nearest in each phase, and GradScale comes to rest where the gradient just fits."""

from __future__ import annotations

import pytest
import torch

from longvideo.kernels.nvfp4.radix4 import Phase, next_scale, quantize_radix4_exact, settled_scale

GRID = [4.0**k for k in range(-3, 4)]


@pytest.mark.parametrize("phase", Phase)
def test_values_are_the_nearest_of_the_phase(phase: Phase) -> None:
    x = torch.linspace(-64, 64, 4097).sign() * torch.linspace(-8, 6, 4097).exp2()
    x[-1] = 64.0
    operand = quantize_radix4_exact(x, phase)
    assert operand.tensor_scale == 1.0 and operand.values.dtype == torch.bfloat16
    grid = torch.tensor([0.0, *GRID], dtype=torch.float64) * phase.value
    grid = torch.cat((grid, -grid))
    values = operand.values.double()
    assert set(values.abs().unique().tolist()) <= set(grid.tolist())
    assert torch.equal((values - x).abs(), (x.double().unsqueeze(-1) - grid).abs().amin(-1))


def test_the_limit_between_two_numbers_is_the_larger_over_one_point_six() -> None:
    limits = torch.tensor([4.0**n / 1.6 for n in range(-2, 4)])
    above, below = limits * 1.0001, limits * 0.9999
    x = torch.cat((above, below, torch.tensor([64.0])))
    values = quantize_radix4_exact(x, Phase.EVEN).values.float()
    assert values.tolist() == [*GRID[1:], *GRID[:-1], 64.0]


def test_errors_of_the_phases_have_opposite_signs_where_both_have_neighbors() -> None:
    """Between 1.25 and 2 times a power of four the one phase rounds down and the other up."""
    x = torch.linspace(1.2, 1.8, 101)
    x = torch.cat((x, torch.tensor([64.0])))
    even, odd = (quantize_radix4_exact(x, phase).values.float()[:-1] for phase in Phase)
    assert (even < x[:-1]).all() and (odd[x[:-1] > 1.25] > x[:-1][x[:-1] > 1.25]).all()


@pytest.mark.parametrize("amax", [1e-12, 3.0, 32.0, 32.1, 63.9, 64.0, 64.1, 1e9])
@pytest.mark.parametrize("start", [2.0**-40, 1.0, 2.0**50])
def test_grad_scale_settles_where_the_largest_magnitude_just_fits(amax: float, start: float) -> None:
    scale, largest = torch.tensor(start), torch.tensor(amax)
    for _ in range(200):
        scale = next_scale(scale, largest)
    assert 32 < scale * largest <= 64
    assert torch.equal(scale, settled_scale(largest))


def test_grad_scale_moves_by_one_factor_of_two() -> None:
    scale = torch.tensor(4.0)
    assert next_scale(scale, torch.tensor(16.1)) == 2.0
    assert next_scale(scale, torch.tensor(16.0)) == 4.0
    assert next_scale(scale, torch.tensor(8.0)) == 8.0


@pytest.mark.parametrize("phase", Phase)
def test_a_zero_tensor_stays_zero(phase: Phase) -> None:
    operand = quantize_radix4_exact(torch.zeros(3, 4), phase)
    assert (operand.values == 0).all() and torch.isfinite(operand.tensor_scale)
