"""Errors of a velocity prediction, and the noise buckets that they are kept in.

Shapes: B samples, C channels, T latent frames, H W latent grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longvideo.flow.schedule import NUM_TRAIN_TIMESTEPS, expand


def noise_bucket(sigma: Tensor, buckets: int, *, shift: float) -> Tensor:
    """Return the bucket of each noise level: equal ranges of the training timesteps, the noisiest first.

    Levels of the schedule are equally spaced before their shift, so all buckets are drawn equally often.
    """
    sigma = sigma.double()
    unshifted = sigma / (shift - (shift - 1) * sigma)
    timestep = ((1 - unshifted) * NUM_TRAIN_TIMESTEPS).round().long().clamp(0, NUM_TRAIN_TIMESTEPS - 1)
    return timestep * buckets // NUM_TRAIN_TIMESTEPS


@torch.no_grad()
def prediction_errors(
    velocity_BCTHW: Tensor, target_BCTHW: Tensor, noisy_BCTHW: Tensor, clean_BCTHW: Tensor, sigma_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the latent errors x0_pred - x0 and the noise errors (v_pred - v_target) (1 - sigma), float32.

    x0 are the original latents, whatever was injected, and sigma_BT is the noise level of the noisy copy. A frame of
    sigma 0 is given, not predicted: its noise error is set to 0; its latent error is 0 by definition.
    """
    sigma = expand(sigma_BT.float())
    latent_error = noisy_BCTHW.float() - sigma * velocity_BCTHW.float() - clean_BCTHW.float()
    noise_error = (velocity_BCTHW.float() - target_BCTHW.float()) * (1 - sigma) * (sigma > 0)
    return latent_error, noise_error
