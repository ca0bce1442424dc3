"""Distillation where everything is known: the same code as for videos, on points in the plane."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from longvideo.distill.engine import PairedEngine
from longvideo.distill.objectives import CriticObjective, DmdConfig, NoisyCopies, StudentObjective
from longvideo.distill.self_forcing import Rollout, RolloutConfig, SelfForcing
from longvideo.flow.schedule import FlowSchedule, expand
from longvideo.flow.unipc import UniPC
from longvideo.training.engine import LocalEngine
from longvideo.training.optimizer import OptimizerConfig, RateSegment, rate_schedule
from tests.distill.points import CPU, POINTS, SHAPE, SPEC, Exact, Learned, Mixture, PointNetwork, ThreeNetworks, clip

CENTRES = torch.tensor([[1.0, 0.0], [-0.6, 0.8], [-0.4, -0.9]])
TRAINED = 1300
SHIFT = 1.0  # points need no shift towards noise


def parts_of(roles: ThreeNetworks, *, steps: int, **config: Any) -> tuple[SelfForcing, NoisyCopies]:
    rollouts = SelfForcing(roles, RolloutConfig(steps=steps, exits="last"), spec=SPEC, shape=SHAPE, shift=SHIFT, seed=0)
    copies = NoisyCopies(rollouts, DmdConfig(checkpoint=False, **config), guidance=1.0, shift=SHIFT, seed=0)
    return rollouts, copies


def test_gradient_equals_the_analytic_one_at_known_densities() -> None:
    """x0 hat = (x + sigma^2 score(x)) / (1 - sigma), so the gradient is sigma^2 / (1 - sigma) times the difference of
    scores, over the distance to the teacher's estimate. Scores by automatic differentiation of log densities."""
    data, generated = Mixture(CENTRES, 0.3), Mixture(CENTRES.roll(1, 1) * 0.7, 0.5)
    roles = ThreeNetworks(Exact(generated.x0), Exact(generated.x0), Exact(data.x0))
    rollouts, copies = parts_of(roles, steps=2, epsilon=1e-12)
    what = clip(3, samples=4)
    x0 = (
        generated.sample(4 * POINTS, torch.Generator().manual_seed(0))
        .view(4, POINTS, 2)
        .movedim(-1, 1)[..., None, None]
    )
    (gradient,) = copies.gradients(what, Rollout([1], [x0], [x0]))
    (noise,), (sigma,) = copies.draw(what, "student")

    def score(mixture: Mixture, x: Tensor) -> Tensor:
        x = x.double().requires_grad_()
        level = expand(sigma).double()
        variance = (((1 - level) * mixture.deviation) ** 2 + level**2).squeeze(1)
        offsets = x.unsqueeze(1) - (1 - level[:, None]) * mixture.centres.double()[None, :, :, None, None, None]
        log_density = torch.logsumexp(-offsets.square().sum(2) / (2 * variance[:, None]), 1) - variance.log()
        return torch.autograd.grad(log_density.sum(), x)[0]

    noisy = copies.schedule.add_noise(x0, noise, sigma)
    level = expand(sigma).double()
    teacher = (noisy + level**2 * score(data, noisy)) / (1 - level)
    size = (x0 - teacher).abs().mean((1, 2, 3, 4), keepdim=True)
    expected = level**2 / (1 - level) * (score(generated, noisy) - score(data, noisy)) / size
    assert (gradient - expected).abs().max() < 1e-3 * expected.abs().max()


def train_teacher(data: Mixture, steps: int) -> Learned:
    torch.manual_seed(0)
    network, schedule = Learned(), FlowSchedule(SHIFT)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for step in range(steps):
        x0 = data.sample(16 * POINTS, generator).view(16, POINTS, 2).movedim(-1, 1)[..., None, None]
        sigma = schedule.sample_sigma((16, POINTS), generator)
        noise = torch.randn(x0.shape, generator=generator)
        loss = (velocity(network, schedule.add_noise(x0, noise, sigma), sigma) - (noise - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()
    return network


def velocity(network: PointNetwork, x: Tensor, sigma_BT: Tensor) -> Tensor:
    return network(x, sigma_BT, clip(0).features_PJD, rope=None, attention=None)  # type: ignore[arg-type]


@torch.no_grad()
def sample(network: PointNetwork, steps: int, *, count: int, seed: int) -> Tensor:
    """Return points [count, 2]."""
    solver = UniPC(steps, SHIFT)
    shape = (count // POINTS, *SHAPE)
    trajectory = solver.start(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    for timestep in solver.timesteps:
        trajectory.step(velocity(network, trajectory.sample, torch.full((count // POINTS, POINTS), timestep / 1000)))
    return trajectory.sample[..., 0, 0].movedim(1, -1).reshape(-1, 2)


def quantiles(points: Tensor, count: int = 1024) -> Tensor:
    """Return the sorted projections of points on 64 lines, averaged down to `count` a line."""
    lines = torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
    projected = (points @ (lines / lines.norm(dim=1, keepdim=True)).T).sort(0).values
    return projected.unflatten(0, (count, -1)).mean(1)


def distance(network: PointNetwork, steps: int, reference: Tensor, draws: int = 24) -> float:
    """Return the mean sliced Wasserstein distance of 1024 samples to a reference distribution."""
    distances = (quantiles(sample(network, steps, count=1024, seed=seed)) for seed in range(draws))
    return sum((points - reference).square().mean().sqrt().item() for points in distances) / draws


@pytest.mark.slow
def test_student_matches_the_teachers_distribution() -> None:
    """Within 10 % of what as many samples of the teacher itself differ from its distribution."""
    torch.set_num_threads(1)
    steps = 4
    teacher = train_teacher(Mixture(CENTRES, 0.3), 1000)
    student, critic = copy.deepcopy(teacher), copy.deepcopy(teacher)
    reference = quantiles(sample(teacher, 50, count=64 * 1024, seed=999))
    resampling, before = distance(teacher, 50, reference), distance(student, steps, reference)
    assert before > 1.8 * resampling
    rollouts, copies = parts_of(ThreeNetworks(student, critic, teacher), steps=steps)
    config = OptimizerConfig(learning_rate=5e-4, beta1=0.0, warmup_steps=0)
    segments = [RateSegment(TRAINED)]
    objectives = StudentObjective(rollouts, copies), CriticObjective(rollouts, copies)
    students, critics = (
        LocalEngine(objective, config, precision="fp32", device=CPU, ema_decay=decay)
        for objective, decay in zip(objectives, (0.99, 0.0), strict=True)
    )
    engine = PairedEngine(
        (objectives[0], students),
        (objectives[1], critics),
        critic_rate=rate_schedule(OptimizerConfig(learning_rate=1e-3, warmup_steps=0), segments),
        student_every=5,
    )
    rate = rate_schedule(config, segments)
    for step in range(TRAINED):
        engine.train_step([clip(step, samples=8)], step, rate(step))
    with engine.averaged():
        after = distance(student, steps, reference)
    assert after < 1.1 * resampling, (before, after, resampling)
