"""Measure videos of two decoders against each other, over the frame and by region: objects, outlines, background.

Shapes: B clips, F pixel frames, H W pixels.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from longvideo.pixels import LEVELS
from longvideo.train.vae.reconstruction import clip_psnr

if TYPE_CHECKING:
    from collections.abc import Mapping

OUTLINE_PIXELS = 2
"""Largest distance in pixels of a pixel of an outline from the edge."""
EDGE_CONTRAST = 0.1
"""Smallest difference of neighboring pixels, of 2, that is an edge of color."""


def object_regions(mask_B1FHW: Tensor) -> dict[str, Tensor]:
    """Divide frames at the edges of objects. mask: share of every pixel that objects cover.

    Outlines are the pixels within 2 of an edge, on either side; the others are objects or background. Each region is 1
    or 0 and [B, 1, F, H, W].
    """
    objects = (mask_B1FHW > 0.5).float()
    outlines = _grown(objects) * _grown(1 - objects)
    return {
        "objects": objects * (1 - outlines),
        "outlines": outlines,
        "background": (1 - objects) * (1 - outlines),
    }


def picture_regions(video_B3FHW: Tensor) -> dict[str, Tensor]:
    """Divide frames of unknown contents into the pixels near edges of color, and the rest."""
    outlines = color_outlines(video_B3FHW)
    return {"outlines": outlines, "flat": 1 - outlines}


def color_outlines(video_B3FHW: Tensor) -> Tensor:
    """Return 1 for pixels within 2 of an edge of color, and 0 for others: [B, 1, F, H, W]."""
    edges = torch.zeros_like(video_B3FHW[:, :1])
    for axis in (3, 4):
        length = video_B3FHW.shape[axis] - 1
        first, second = video_B3FHW.narrow(axis, 0, length), video_B3FHW.narrow(axis, 1, length)
        contrast = ((first - second).abs().amax(1, keepdim=True) > EDGE_CONTRAST).float()
        # an edge is between two pixels, which are both at distance 1
        before, after = ((0, 1), (1, 0)) if axis == 4 else ((0, 0, 0, 1), (0, 0, 1, 0))
        edges = torch.maximum(edges, torch.maximum(F.pad(contrast, before), F.pad(contrast, after)))
    return _grown(edges, OUTLINE_PIXELS - 1)


def _grown(region: Tensor, pixels: int = OUTLINE_PIXELS) -> Tensor:
    """Return a region with all pixels within a distance of it, in squares."""
    return F.max_pool2d(region.flatten(0, 2), 2 * pixels + 1, stride=1, padding=pixels).view_as(region)


class Comparison:
    """Differences of videos from reference videos, added up over clips."""

    def __init__(self) -> None:
        self.psnr: list[Tensor] = []
        self.errors: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2))

    def add(self, video: Tensor, reference: Tensor, regions: Mapping[str, Tensor]) -> None:
        """Add clips [B, 3, F, H, W] in [-1, 1]; values outside of it are clamped."""
        video, reference = video.clamp(-1, 1), reference.clamp(-1, 1)
        self.psnr.append(clip_psnr(video, reference, torch.ones_like(reference[:, :1]))[0].cpu())
        error = (video - reference).abs().mean(1, keepdim=True)
        for name, region in regions.items():
            self.errors[name] = self.errors[name] + torch.stack(((error * region).sum(), region.sum())).cpu()

    def values(self) -> dict[str, float]:
        """Return the mean peak signal-to-noise ratio, dB, and the mean error of each region in 8-bit levels."""
        errors = {name: LEVELS * (total / count.clamp_min(1)).item() for name, (total, count) in self.errors.items()}
        return {"psnr": torch.cat(self.psnr).mean().item(), **errors}


def table(comparisons: Mapping[str, Mapping[str, float]]) -> str:
    """Return a table with a row for each comparison. comparisons: values of `Comparison.values` by name."""
    columns = list(next(iter(comparisons.values())))
    width = max(map(len, comparisons))
    head = "  ".join(["".ljust(width), *(f"{name:>10}" for name in columns)])
    rows = [
        "  ".join([name.ljust(width), *(f"{values[column]:10.3f}" for column in columns)])
        for name, values in comparisons.items()
    ]
    return "\n".join([f"{head}  (psnr in dB; mean errors in 8-bit levels)", *rows])
