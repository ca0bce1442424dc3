"""Distribution matching distillation as arithmetic on latents (DMD, arXiv 2311.18828; DMD2, arXiv 2405.14867).

Two denoisers estimate the clean latents of one noisy sample of the student: the teacher, which was trained on the data,
and the critic, which is trained on the student's samples. Where they differ, the student's distribution differs from
the teacher's.

Shapes: B batch, C channels, T latent frames of a chunk, H W latent size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longvideo.flow.schedule import expand, shift_sigma


def sample_score_sigma(
    shape: tuple[int, ...], generator: torch.Generator, *, shift: float, low: float, high: float
) -> Tensor:
    """Draw the noise levels at which a sample is compared: uniform, shifted, then clamped between low and high."""
    return shift_sigma(torch.rand(shape, generator=generator), shift).clamp(low, high)


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Return a prediction with classifier-free guidance (arXiv 2207.12598); a scale of 1 changes nothing."""
    return unconditional + scale * (conditional - unconditional)


def x0_of(x_BCTHW: Tensor, velocity_BCTHW: Tensor, sigma_BT: Tensor) -> Tensor:
    """Return the clean latents that a velocity points to."""
    return x_BCTHW - expand(sigma_BT) * velocity_BCTHW


def dmd_gradient(
    x0_BCTHW: Tensor, teacher_BCTHW: Tensor, critic_BCTHW: Tensor, weight_BT: Tensor, *, epsilon: float
) -> Tensor:
    """Return the gradient with respect to a chunk, (critic - teacher) / mean |x0 - teacher|.

    teacher_BCTHW, critic_BCTHW: their clean estimates from one noisy copy of x0. weight_BT: 0 for given frames, which
    get no gradient and do not count in the mean; the mean is over one sample (DMD, equation 8). epsilon: number added
    to the mean, so that the gradient stays small where teacher and student are equal.
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
