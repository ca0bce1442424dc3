"""The objective of the autoencoder: reconstruct small moving shapes and their outlines from slightly noisy latents.

Shapes: B clips, C channels, T frames, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from longvideo.config.fields import Bounded, bounded
from longvideo.training.objective import Objective

if TYPE_CHECKING:
    from collections.abc import Callable

    from longvideo.train.vae.clips import ClipBatch
    from longvideo.vae.autoencoder import Autoencoder

LOG_VARIANCE_RANGE = (-30.0, 20.0)
VIDEO_RANGE = 2.0
"""Difference of the largest and the smallest pixel value, in [-1, 1]."""
SMALLEST_ERROR = 1e-10
"""Lower bound of a mean squared error in a peak signal-to-noise ratio, which would be infinite without an error."""


@dataclass(frozen=True)
class ReconstructionConfig(Bounded):
    """Weights of the terms of the loss.

    l1: weight of the Charbonnier error, a smooth absolute error.
    l2: weight of the squared error.
    edge: weight of the absolute error of differences between pixels that are neighbors in space.
    temporal: weight of the absolute error of differences between pixels that are neighbors in time.
    foreground: additional weight of the pixels of an object.
    margin: distance in pixels up to which the pixels around an object have its weight.
    kl: weight of the divergence of the latents from a unit Gaussian, for each latent value.
    charbonnier: error below which the Charbonnier error is nearly quadratic.
    compile: whether to compile the objective; only on CUDA.
    compile_mode: mode of `torch.compile`.
    """

    l1: float = bounded(1.0, least=0)
    l2: float = bounded(1.0, least=0)
    edge: float = bounded(1.0, least=0)
    temporal: float = bounded(0.25, least=0)
    foreground: float = bounded(4.0, least=0)
    margin: int = bounded(3, least=0)
    kl: float = bounded(1e-4, least=0)
    charbonnier: float = bounded(1e-3, above=0)
    compile: bool = True
    compile_mode: str = "default"


class Reconstruction(Objective):
    """Encode, draw latents, decode, compare. On CUDA there is one compiled graph for each shape of batch."""

    def __init__(self, autoencoder: Autoencoder, config: ReconstructionConfig, *, device: torch.device) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.config = config
        self._run: Callable[..., tuple[Tensor, dict[str, Tensor]]] = self._forward
        if config.compile and device.type == "cuda":
            self._run = torch.compile(self._forward, dynamic=False, mode=config.compile_mode)

    def forward(self, batch: ClipBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return self._run(batch.video, batch.mask, batch.noise)

    def _forward(self, video: Tensor, mask: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        moments, _ = self.autoencoder.encode(video)
        mean, log_variance = moments.float().chunk(2, dim=1)
        log_variance = log_variance.clamp(*LOG_VARIANCE_RANGE)
        latents = mean + (0.5 * log_variance).exp() * noise
        output, _ = self.autoencoder.decode(latents)
        return self.compare(output.float(), video, mask, mean, log_variance)

    def compare(
        self, output: Tensor, video: Tensor, mask: Tensor, mean: Tensor, log_variance: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its parts, all in float32."""
        config = self.config
        weight = pixel_weight(mask, foreground=config.foreground, margin=config.margin)
        error = output - video
        charbonnier = (error.square() + config.charbonnier**2).sqrt() - config.charbonnier
        edge = sum(weighted_mean(difference(error, axis).abs(), tail(weight, axis)) for axis in (3, 4)) / 2
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = (
            config.l1 * weighted_mean(charbonnier, weight)
            + config.l2 * weighted_mean(error.square(), weight)
            + config.edge * edge
            + config.kl * kl
        )
        if video.shape[2] > 1 and config.temporal:
            loss = loss + config.temporal * weighted_mean(difference(error, 2).abs(), tail(weight, 2))
        overall, objects = clip_psnr(output.detach(), video, mask)
        return loss, {"psnr": overall.mean(), "object": objects.mean(), "kl": kl.detach()}


def pixel_weight(mask: Tensor, *, foreground: float, margin: int) -> Tensor:
    """Return 1 on the background and 1 + foreground on objects, grown by `margin` pixels; [B, 1, T, H, W]."""
    grown = F.max_pool2d(mask.flatten(0, 2), 2 * margin + 1, stride=1, padding=margin)
    return 1 + foreground * grown.view_as(mask)


def weighted_mean(error_BCTHW: Tensor, weight_B1THW: Tensor) -> Tensor:
    """Average over channels and, by weight, over pixels."""
    return (error_BCTHW.mean(1, keepdim=True) * weight_B1THW).sum() / weight_B1THW.sum()


def difference(x: Tensor, axis: int) -> Tensor:
    """Return the differences between neighbors along an axis."""
    return tail(x, axis) - x.narrow(axis, 0, x.shape[axis] - 1)


def tail(x: Tensor, axis: int) -> Tensor:
    """Return x without its first element along an axis."""
    return x.narrow(axis, 1, x.shape[axis] - 1)


def clip_psnr(output: Tensor, video: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the peak signal-to-noise ratio of every clip in dB, [B], over the frame and over the objects."""
    error = (output.clamp(-1, 1) - video).square().mean(1, keepdim=True) / VIDEO_RANGE**2
    overall = error.mean((1, 2, 3, 4))
    objects = (error * mask).sum((1, 2, 3, 4)) / mask.sum((1, 2, 3, 4)).clamp_min(1.0)
    return decibels(overall), decibels(objects)


def decibels(error: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of mean squared errors relative to the range, at most 100 dB."""
    return -10 * torch.log10(error.clamp_min(SMALLEST_ERROR))
