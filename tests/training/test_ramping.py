"""Q-Ramping equals algorithm 2 of arXiv 2502.20853 in Python numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from longvideo.training.ramping import RampingAdamW

STEPS, SIZE = 20, 4
RATE, BETA1, BETA2, EPS, DECAY = 0.1, 0.9, 0.99, 1e-8, 0.02
PERIODS = {0: [1, 2, 3, 5], 10: [3, 1, 1, 2]}
"""Numbers of gradients of an update, from a step on."""


def gradients() -> list[list[float]]:
    return torch.randn(STEPS, SIZE, generator=torch.Generator().manual_seed(4), dtype=torch.float64).tolist()


def by_definition(rows: list[list[float]], periods: dict[int, list[int]]) -> list[list[float]]:
    weights, m, v = [0.5] * SIZE, [0.0] * SIZE, [0.0] * SIZE
    total, count, result = [0.0] * SIZE, [0] * SIZE, []
    current = [1] * SIZE
    for t, row in enumerate(rows, start=1):
        current = periods.get(t - 1, current)
        for i, g in enumerate(row):
            total[i], count[i] = total[i] + g, count[i] + 1
            weights[i] *= 1 - RATE * DECAY
            if count[i] < current[i]:
                continue
            mean = total[i] / count[i]
            m[i], v[i] = BETA1 * m[i] + (1 - BETA1) * mean, BETA2 * v[i] + (1 - BETA2) * mean**2
            root = math.sqrt(v[i] / (1 - BETA2**t))
            weights[i] -= RATE * count[i] * (m[i] / (1 - BETA1**t)) / (root + EPS)
            total[i], count[i] = 0.0, 0
        result.append(list(weights))
    return result


def new_optimizer(ramped: nn.Parameter, plain: nn.Parameter) -> RampingAdamW:
    return RampingAdamW(
        [ramped, plain], ramped=[ramped], learning_rate=RATE, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY
    )


@pytest.mark.parametrize("periods", [PERIODS, {}])
def test_weights_follow_the_definition_and_other_parameters_adamw(periods: dict[int, list[int]]) -> None:
    ramped, plain = (nn.Parameter(torch.full((SIZE,), 0.5)) for _ in range(2))
    optimizer = new_optimizer(ramped, plain)
    expected = zip(by_definition(gradients(), periods), by_definition(gradients(), {}), strict=True)
    for step, (row, with_period_1) in enumerate(expected):
        if step in periods:
            optimizer.set_periods(ramped, torch.tensor(periods[step]))
        ramped.grad, plain.grad = (torch.tensor(gradients()[step]) for _ in range(2))
        optimizer.step()
        assert ramped.tolist() == pytest.approx(row, rel=1e-5, abs=1e-6)
        assert plain.tolist() == pytest.approx(with_period_1, rel=1e-5, abs=1e-6)


def test_a_skipped_step_changes_no_state() -> None:
    ramped, plain = (nn.Parameter(torch.full((SIZE,), 0.5)) for _ in range(2))
    optimizer = new_optimizer(ramped, plain)
    optimizer.set_periods(ramped, torch.tensor(PERIODS[0]))
    for gradient, is_bad in ((1.0, 0.0), (math.nan, 1.0)):
        before = {name: value.clone() for name, value in optimizer.state[ramped].items()} | {"": ramped.clone()}
        ramped.grad, plain.grad = torch.full((SIZE,), gradient), torch.full((SIZE,), gradient)
        optimizer.found_inf = torch.tensor(is_bad)
        optimizer.step()
    after = {**optimizer.state[ramped], "": ramped}
    assert all(torch.equal(before[name], after[name]) for name in before)
