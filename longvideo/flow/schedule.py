"""Rectified flow: noising, velocity, training timesteps and their weights.

x_sigma = (1 - sigma) x0 + sigma noise, velocity = noise - x0 (flow matching, arXiv 2210.02747). Noise levels are
shifted as in Wan (arXiv 2503.20314).
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Return noise levels moved towards 1: shift * sigma / (1 + (shift - 1) * sigma)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def expand(sigma_BT: Tensor) -> Tensor:
    """Return noise levels of latent frames with the shape [B, 1, T, 1, 1]."""
    return sigma_BT[:, None, :, None, None]


class FlowSchedule:
    """Noise levels of training. Only `sample_sigma` is restricted to a table; everything else takes any level."""

    def __init__(self, shift: float = 5.0) -> None:
        self.shift = shift
        self.sigmas = shift_sigma(torch.linspace(1, 0, NUM_TRAIN_TIMESTEPS + 1, dtype=torch.float64)[:-1], shift)
        weight = self._bell(self.sigmas)
        self._weight_floor = weight.min().item()
        self._weight_scale = NUM_TRAIN_TIMESTEPS / (weight - self._weight_floor).sum().item()

    def sample_sigma(
        self, shape: tuple[int, ...], generator: torch.Generator, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Return levels drawn uniformly from the table of 1000 training timesteps, float32."""
        index = torch.randint(NUM_TRAIN_TIMESTEPS, shape, generator=generator, device=generator.device)
        return self.sigmas.float().to(generator.device)[index].to(device)

    def add_noise(self, x0_BCTHW: Tensor, noise_BCTHW: Tensor, sigma_BT: Tensor) -> Tensor:
        """Return (1 - sigma) x0 + sigma noise."""
        sigma = expand(sigma_BT)
        return (1 - sigma) * x0_BCTHW + sigma * noise_BCTHW

    def velocity(self, x0: Tensor, noise: Tensor) -> Tensor:
        """Return noise - x0."""
        return noise - x0

    def x0_from_velocity(self, x_BCTHW: Tensor, velocity_BCTHW: Tensor, sigma_BT: Tensor) -> Tensor:
        """Return the clean latents that noisy latents and a velocity imply."""
        return x_BCTHW - expand(sigma_BT) * velocity_BCTHW

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """Return weights of the velocity error: a bell around sigma 0.5, zero at 1, with mean 1 over the table."""
        return (self._bell(sigma) - self._weight_floor) * self._weight_scale

    @staticmethod
    def _bell(sigma: Tensor) -> Tensor:
        return torch.exp(-2 * (sigma - 0.5) ** 2)
