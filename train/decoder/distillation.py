"""The objective of the small decoder: the pixels of the full decoder, their outlines and their changes in time.

Shapes: B windows, C channels, T latent frames, F pixel frames, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.config.fields import Bounded, bounded
from longvideo.train.decoder.report import color_outlines
from longvideo.train.vae.reconstruction import VIDEO_RANGE, decibels, difference, tail
from longvideo.training.objective import Objective, ratio

if TYPE_CHECKING:
    from collections.abc import Callable

    from longvideo.train.decoder.windows import WindowBatch
    from longvideo.vae.tae import TinyDecoder


@dataclass(frozen=True)
class DistillationConfig(Bounded):
    """Weights of the terms of the loss.

    l1: weight of the absolute error.
    l2: weight of the squared error. It is largest where the decoder shows no object or rounds a corner, which changes
        few pixels by much.
    edge: weight of the absolute error of differences between pixels that are neighbors in space.
    temporal: weight of the absolute error of differences between pixels that are neighbors in time.
    outlines: additional weight of the pixels near an outline, which is an edge of color in the full decoder's picture.
    compile: whether to compile the objective; only on CUDA.
    compile_mode: mode of `torch.compile`.
    """

    l1: float = bounded(1.0, least=0)
    l2: float = bounded(8.0, least=0)
    edge: float = bounded(1.0, least=0)
    temporal: float = bounded(0.5, least=0)
    outlines: float = bounded(16.0, least=0)
    compile: bool = True
    compile_mode: str = "default"


class DecoderDistillation(Objective):
    """Decode windows with the small decoder and compare them with the full decoder's pixels.

    The small decoder gets its memory from the latent frames before a window, without gradient; a window that begins a
    video starts with the memory of zeros that a first call has. On CUDA there is one compiled graph for each shape.
    """

    def __init__(
        self, student: TinyDecoder, config: DistillationConfig, *, device: torch.device, compiled: bool
    ) -> None:
        super().__init__()
        self.student = student
        self.config = config
        self._run: Callable[..., tuple[Tensor, dict[str, Tensor]]] = self._forward
        if compiled and device.type == "cuda":
            self._run = torch.compile(self._forward, dynamic=False, mode=config.compile_mode)

    def forward(self, batch: WindowBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return self._run(batch.past, batch.latents, batch.pixels, batch.opening, batch.weight, batch.mean_weight)

    def _forward(
        self, past: Tensor, latents: Tensor, pixels: Tensor, opening_B: Tensor, weight_BF: Tensor, mean_weight: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        video = self.decode(past, latents, opening_B)
        return self.compare(video.float(), pixels, weight_BF, mean_weight)

    def decode(self, past: Tensor, latents: Tensor, opening_B: Tensor) -> Tensor:
        """Return video [B, 3, 4 T, H, W]; the first three frames of a window that begins a video belong to no video."""
        dtype = next(self.student.parameters()).dtype
        # a state is detached, so that no gradient reaches the frames before a window
        _, state = self.student.decode(past.to(dtype))
        keep = (~opening_B)[:, None, None, None, None]
        video, _ = self.student.decode(latents.to(dtype), tuple(x * keep for x in state))
        return video

    def compare(
        self, video: Tensor, pixels: Tensor, weight_BF: Tensor, mean_weight: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its parts, all in float32."""
        config = self.config
        error = video - pixels
        frames = weight_BF[:, None, :, None, None]
        weight = frames * (1 + config.outlines * color_outlines(pixels))

        def mean(values: Tensor, weights: Tensor) -> Tensor:
            # the number of frames is that of the whole step, so that shares of a step add up to its loss
            return (values.mean(1, keepdim=True) * weights).mean((1, 3, 4)).sum() / mean_weight

        l1, l2 = mean(error.abs(), weight), mean(error.square(), weight)
        edge = (
            mean(difference(error, 3).abs(), tail(weight, 3)) + mean(difference(error, 4).abs(), tail(weight, 4))
        ) / 2
        temporal = mean(difference(error, 2).abs(), tail(weight, 2) * frames[:, :, :-1])
        loss = config.l1 * l1 + config.l2 * l2 + config.edge * edge + config.temporal * temporal
        squared_BF = (error.detach().clamp(-VIDEO_RANGE, VIDEO_RANGE) / VIDEO_RANGE).square().mean((1, 3, 4))
        return loss, {
            "psnr": ratio((decibels(squared_BF) * weight_BF).sum(), weight_BF.sum()),
            "l1": l1.detach(),
            "l2": l2.detach(),
            "edge": edge.detach(),
            "temporal": temporal.detach(),
        }
