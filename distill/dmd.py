"""Distribution matching distillation as arithmetic on latents (DMD, arXiv 2311.18828; DMD2, arXiv 2405.14867).

Two denoisers look at one noisy sample of the student: the teacher, which knows the data, and the critic, which knows
what the student makes. Where they differ, the student's distribution differs from the teacher's.

Shapes: B batch, C channels, T latent frames of a chunk, H W latent size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longvideo.flow.schedule import expand, shift_sigma


def sample_score_sigma(
    shape: tuple[int, ...], generator: torch.Generator, *, shift: float, low: float, high: float
) -> Tensor:
    """Draw the noise levels at which a sample is looked at: uniform, shifted, then held between low and high."""
    return shift_sigma(torch.rand(shape, generator=generator), shift).clamp(low, high)


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Apply classifier-free guidance; at a scale of 1 it changes nothing (arXiv 2207.12598)."""
    return unconditional + scale * (conditional - unconditional)


def x0_of(x_BCTHW: Tensor, velocity_BCTHW: Tensor, sigma_BT: Tensor) -> Tensor:
    """Return the clean latents that a velocity points to."""
    return x_BCTHW - expand(sigma_BT) * velocity_BCTHW


def dmd_gradient(
    x0_BCTHW: Tensor, teacher_BCTHW: Tensor, critic_BCTHW: Tensor, weight_BT: Tensor, *, epsilon: float
) -> Tensor:
    """Return the direction in which a chunk is to be moved away, (critic - teacher) / mean |x0 - teacher|.

    teacher, critic: their clean estimates from one noisy copy of x0. weight_BT: 0 for frames that are given; they get
    no gradient and do not count in the mean, which is taken for every sample on its own (DMD, equation 8). epsilon:
    added to the mean, so that a teacher who agrees with the student asks for little, not for infinity.
    """
    weight = expand(weight_BT)
    per_frame = x0_BCTHW[0, :, 0].numel()
    distance = ((x0_BCTHW - teacher_BCTHW).abs() * weight).sum((1, 2, 3, 4), keepdim=True)
    count = weight.sum((1, 2, 3, 4), keepdim=True).clamp(min=1) * per_frame
    return (critic_BCTHW - teacher_BCTHW) * weight / (distance / count + epsilon)


def student_loss(x0_BCTHW: Tensor, gradient_BCTHW: Tensor) -> Tensor:
    """Return a loss, the mean over samples and latents, whose gradient at x0 is the given one over their number."""
    target = (x0_BCTHW - gradient_BCTHW).detach()
    return 0.5 * (x0_BCTHW - target).square().mean()


def critic_error(velocity_BCTHW: Tensor, x0_BCTHW: Tensor, noise_BCTHW: Tensor) -> Tensor:
    """Return the squared error of the critic's velocity for every frame, [B, T]: flow matching on the student's x0."""
    return (velocity_BCTHW - (noise_BCTHW - x0_BCTHW)).square().mean((1, 3, 4))
