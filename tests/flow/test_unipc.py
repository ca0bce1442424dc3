"""The few-step solver against the reference's trajectories."""

from __future__ import annotations

import pytest
import torch

from longvideo.errors import UserError
from longvideo.flow.unipc import UniPC
from tests import golden


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8, 50])
def test_a_trajectory_equals_the_reference(num_steps: int) -> None:
    case = {k.split(".", 1)[1]: v for k, v in golden.load("unipc_a").items() if k.split(".", 1)[0] == str(num_steps)}
    solver = UniPC(num_steps)
    assert solver.timesteps == case["timesteps"].int().tolist()
    assert torch.allclose(torch.tensor(solver.sigmas), case["sigmas"], atol=1e-6)
    trajectory = solver.start(case["start"])
    for timestep in solver.timesteps:
        velocity = torch.tanh(trajectory.sample @ case["field"]) + 0.0005 * timestep * trajectory.sample
        trajectory.step(velocity)
    assert golden.relative_error(trajectory.sample, case["end"]) < golden.TOLERANCE


def test_constant_velocity_is_integrated_exactly() -> None:
    noise, x0 = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64), torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    solver = UniPC(6)
    sigma = solver.sigmas[0]
    trajectory = solver.start((1 - sigma) * x0 + sigma * noise)
    for _ in solver.timesteps:
        trajectory.step(noise - x0)
    assert (trajectory.sample - x0).abs().max() < 1e-12


def test_zero_steps_are_refused() -> None:
    with pytest.raises(UserError, match="at least 1"):
        UniPC(0)
