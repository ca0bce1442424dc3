"""Reduce pictures to at most 256 colors, so that they are small files, with an error that is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

COLOR_TOLERANCE = 2
"""Difference, in levels of a channel, up to which a color needs no color of its own. A larger one shows bands in
gradients."""
HOLD_TOLERANCE = 3
"""Difference, in levels of a channel, up to which a pixel of an animation keeps the color it has. A larger one shows
blotches in gradients that move."""
NUM_LEVELS = 256


@dataclass(frozen=True)
class IndexedFrames:
    """Frames with one palette. palette: uint8 [P, 3]. indices: uint8 [T, H, W], positions in the palette."""

    palette: np.ndarray
    indices: np.ndarray


def index_colors(frames: Sequence[np.ndarray] | np.ndarray, *, limit: int) -> IndexedFrames:
    """Choose a palette of at most `limit` colors for frames uint8 [H, W, 3], and replace each pixel by the nearest.

    Half of the colors are the most frequent ones that are not within COLOR_TOLERANCE of another: flat areas are exact,
    and gradients smooth. Each of the others is the color that is farthest from the palette so far, which keeps small
    objects and the edges of letters. Colors are added until all are within COLOR_TOLERANCE, or `limit` (at most 256) is
    reached. The distance of two colors is the largest difference of a channel.
    """
    counts = np.zeros(NUM_LEVELS**3, np.int64)
    for frame in frames:
        values, numbers = np.unique(_pack(frame), return_counts=True)
        counts[values] += numbers
    packed = np.flatnonzero(counts)
    packed = packed[np.argsort(-counts[packed], kind="stable")]
    colors = np.stack([packed >> 16, packed >> 8 & 255, packed & 255], axis=-1).astype(np.int16)
    distance = np.full(len(colors), NUM_LEVELS, np.int16)
    nearest = np.zeros(len(colors), np.uint8)
    palette: list[np.ndarray] = []
    while len(palette) < limit and distance.max() > COLOR_TOLERANCE:
        index = (distance > COLOR_TOLERANCE).argmax() if len(palette) < limit // 2 else distance.argmax()
        new_distance = np.abs(colors - colors[index]).max(-1)
        nearer = new_distance < distance
        nearest[nearer], distance[nearer] = len(palette), new_distance[nearer]
        palette.append(colors[index])
    table = np.zeros(NUM_LEVELS**3, np.uint8)
    table[packed] = nearest
    return IndexedFrames(np.stack(palette).astype(np.uint8), np.stack([table[_pack(frame)] for frame in frames]))


def hold_colors(frames: IndexedFrames) -> IndexedFrames:
    """Let a pixel keep its color until it differs by more than HOLD_TOLERANCE.

    Noise that is too weak to be seen would otherwise change most pixels in every frame.
    """
    colors = frames.palette.astype(np.int16)
    distance = np.abs(colors[:, None] - colors).max(-1)
    indices = frames.indices.copy()
    for before, now in zip(indices[:-1], indices[1:], strict=True):
        now[:] = np.where(distance[now, before] > HOLD_TOLERANCE, now, before)
    return IndexedFrames(frames.palette, indices)


def _pack(frame: np.ndarray) -> np.ndarray:
    red, green, blue = (frame[..., channel].astype(np.int32) for channel in range(3))
    return red << 16 | green << 8 | blue
