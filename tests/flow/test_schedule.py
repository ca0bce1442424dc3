"""The training schedule against the numbers of the reference."""

from __future__ import annotations

import pytest
import torch

from longvideo.flow.schedule import FlowSchedule


def test_table_has_the_reference_timesteps() -> None:
    timesteps = FlowSchedule(5.0).sigmas * 1000
    assert timesteps[0] == 1000
    assert timesteps[-1].item() == pytest.approx(4.98, abs=0.005)
    assert timesteps.median().item() == pytest.approx(833, abs=1)


@pytest.mark.parametrize(("timestep", "weight"), [(1000, 0.0), (900, 0.63), (500, 2.076), (20, 0.126)])
def test_loss_weight_has_the_reference_values(timestep: float, weight: float) -> None:
    schedule = FlowSchedule(5.0)
    assert schedule.loss_weight(torch.tensor(timestep / 1000)).item() == pytest.approx(weight, abs=0.006)
    assert schedule.loss_weight(schedule.sigmas).mean().item() == pytest.approx(1.0, abs=1e-9)


def test_noising_and_velocity_invert_each_other() -> None:
    schedule, generator = FlowSchedule(5.0), torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 2, 3, 4, 2, 2, generator=generator, dtype=torch.float64)
    sigma = schedule.sample_sigma((2, 4), generator).double()
    noisy = schedule.add_noise(x0, noise, sigma)
    assert torch.allclose(schedule.x0_from_velocity(noisy, schedule.velocity(x0, noise), sigma), x0, atol=1e-12)


def test_levels_follow_the_generator_alone() -> None:
    schedule = FlowSchedule(5.0)
    draws = [schedule.sample_sigma((1000,), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert draws[0].min() >= 0.0049 and draws[0].max() <= 1.0
