"""The random Hadamard transform is orthogonal for every number of points, so products keep their values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from longvideo.kernels.nvfp4 import draws
from longvideo.kernels.nvfp4.format import HADAMARD_SIGNS
from longvideo.kernels.nvfp4.hadamard import HADAMARD_POINTS, fixed_signs, random_hadamard


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def signs_of(points: int, *, redrawn: bool) -> Tensor | None:
    return draws.signs(torch.tensor(9), points) if redrawn else None


@pytest.mark.parametrize("redrawn", [False, True])
@pytest.mark.parametrize("points", HADAMARD_POINTS)
def test_the_transform_is_the_hadamard_matrix_after_sign_flips(points: int, redrawn: bool) -> None:
    """The matrix of Sylvester: the sign of entry (i, j) is the parity of the bits that i and j share."""
    signs = signs_of(points, redrawn=redrawn)
    flips = fixed_signs(points, torch.device("cpu")) if signs is None else signs
    matrix = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(points)] for i in range(points)])
    expected = flips.unsqueeze(1) * matrix / math.sqrt(points)
    torch.testing.assert_close(random_hadamard(torch.eye(points), points, signs=signs), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("redrawn", [False, True])
@pytest.mark.parametrize("points", HADAMARD_POINTS)
def test_products_keep_their_values(points: int, redrawn: bool) -> None:
    signs = signs_of(points, redrawn=redrawn)
    a, b = gaussian(5, 256), gaussian(7, 256, seed=1)
    product = random_hadamard(a, points, signs=signs) @ random_hadamard(b, points, signs=signs).t()
    torch.testing.assert_close(product, a @ b.t(), rtol=0, atol=1e-4)


def test_sixteen_points_add_in_the_order_that_kernels_repeat() -> None:
    """Pairs first: every round adds neighbors and moves differences to the second half."""
    x = gaussian(16).mul(torch.tensor([2.0**k for k in range(-8, 8)]))
    values = [value * sign for value, sign in zip(x, HADAMARD_SIGNS, strict=True)]
    for _ in range(4):
        pairs = [(values[i], values[i + 1]) for i in range(0, 16, 2)]
        values = [a + b for a, b in pairs] + [a - b for a, b in pairs]
    assert torch.equal(random_hadamard(x), torch.stack(values) * 0.25)


@pytest.mark.parametrize("points", HADAMARD_POINTS)
def test_an_outlier_is_spread_over_all_points(points: int) -> None:
    x = torch.zeros(2, points)
    x[0, 3] = 8.0
    spread = random_hadamard(x, points)
    torch.testing.assert_close(spread[0].abs(), torch.full((points,), 8 / math.sqrt(points)))
    assert (spread[1] == 0).all()


def test_signs_may_differ_from_row_to_row() -> None:
    x = gaussian(3, 128)
    signs = torch.stack([draws.signs(torch.tensor(seed), 64) for seed in range(3)])
    together = random_hadamard(x, 64, signs=signs.unsqueeze(1))
    rows = [random_hadamard(row, 64, signs=own) for row, own in zip(x, signs, strict=True)]
    assert torch.equal(together, torch.stack(rows))


def test_fixed_signs_are_balanced_and_of_sixteen_points_those_of_the_format() -> None:
    assert fixed_signs(16, torch.device("cpu")).tolist() == list(HADAMARD_SIGNS)
    for points in (64, 128):
        assert abs(fixed_signs(points, torch.device("cpu")).sum()) < 4 * math.sqrt(points)


def test_a_first_run_in_inference_mode_still_differentiates() -> None:
    fixed_signs.cache_clear()
    with torch.inference_mode():
        random_hadamard(torch.ones(16))
    x = torch.ones(16, requires_grad=True)
    random_hadamard(x).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_other_numbers_of_points_and_parts_of_a_transform_are_refused() -> None:
    with pytest.raises(ValueError, match="has 32 points; expected one of"):
        random_hadamard(torch.zeros(32), 32)
    with pytest.raises(ValueError, match=r"\[2, 96\]; expected a last dimension that is a multiple of 64"):
        random_hadamard(torch.zeros(2, 96), 64)
