"""Measure the accuracy of the judge on rendered scenes, clean and degraded as by a small autoencoder.

The content of rendered scenes is known, so the errors of the judge on them limit the precision of its verdicts on a
model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.evaluation.judge import MAX_FRAMES, Verdict, judge
from longvideo.evaluation.shapeworld import OPENING_SECONDS, Score, count_confusions, scores
from longvideo.shapeworld.batch import SceneBatch
from longvideo.shapeworld.render import render
from longvideo.shapeworld.world import sample_scene

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

BLUR_SIGMA = 1.2  # pixels
NOISE_SIGMA = 8.0  # of 255
QUANTUM = 12.0  # gray levels: coarse bands, as after strong compression
CONTRAST = 0.93
TINT_SIGMA = 6.0


@dataclass(frozen=True)
class Accuracy:
    """Scores and confusions of the judge on `num` scenes in one condition, one of CONDITIONS."""

    condition: str
    num: int
    scores: dict[str, Score]
    confusions: dict[str, int]


def measure_judge(num: int, *, seed: int = 0, on_scene: Callable[[], None] = lambda: None) -> list[Accuracy]:
    """Judge `num` scenes, alternately of the training and the held-out split, in every condition.

    on_scene: called after each scene, for progress.
    """
    verdicts: dict[str, list[Verdict]] = {name: [] for name in CONDITIONS}
    # the judge samples this many frames of a longer clip, so no more are rendered
    fps = MAX_FRAMES / OPENING_SECONDS
    times = torch.arange(MAX_FRAMES) / fps
    for index in range(seed * num, (seed + 1) * num):
        scene = sample_scene(index, split="heldout" if index % 2 else "train")
        video = (render(SceneBatch.from_scenes([scene]), times[None])[0].transpose(0, 1) + 1) * 127.5
        generator = torch.Generator().manual_seed(index)
        for name, degrade in CONDITIONS.items():
            verdicts[name].append(judge(to_frames(degrade(video, generator)), scene, fps))
        on_scene()
    return [Accuracy(name, num, scores(own), count_confusions(own)) for name, own in verdicts.items()]


def clean(video_TCHW: Tensor, _generator: torch.Generator) -> Tensor:
    """Return the video unchanged. Gray levels are in [0, 255]."""
    return video_TCHW


def soft(video_TCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Blur and add noise."""
    blurred = gaussian_blur(video_TCHW, BLUR_SIGMA)
    return blurred + NOISE_SIGMA * torch.randn(blurred.shape, generator=generator)


def compressed(video_TCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, fade, tint, add noise, and round to coarse bands."""
    tint = TINT_SIGMA * torch.randn(3, 1, 1, generator=generator)
    faded = soft((video_TCHW - 127.5) * CONTRAST + 127.5 + tint, generator)
    return (faded / QUANTUM).round() * QUANTUM


CONDITIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "clean": clean,
    "soft": soft,
    "compressed": compressed,
}


def gaussian_blur(video_TCHW: Tensor, sigma: float) -> Tensor:
    """Blur every frame with a Gaussian filter. sigma: standard deviation, pixels."""
    reach = int(3 * sigma + 0.5)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    flat = torch.nn.functional.pad(video_TCHW.flatten(0, 1)[:, None], [reach] * 4, mode="replicate")
    flat = torch.nn.functional.conv2d(flat, kernel.view(1, 1, 1, -1))
    flat = torch.nn.functional.conv2d(flat, kernel.view(1, 1, -1, 1))
    return flat.view(video_TCHW.shape)


def to_frames(video_TCHW: Tensor) -> np.ndarray:
    """Round gray levels to uint8 [T, H, W, 3]."""
    return video_TCHW.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
