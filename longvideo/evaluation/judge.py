"""Read the content of a ShapeWorld video by classical vision, and compare it with the expected scene.

`perceive` uses the vocabulary of ShapeWorld and the outlines and backgrounds of its renderer, but not the prompt. It
subtracts the background, groups the remaining pixels into objects by connection and color, matches outlines in polar
coordinates, and classifies motions by the objects' tracks. `compare` then compares the objects with those of the scene.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from longvideo.errors import UserError
from longvideo.evaluation.motion_reading import Track, read_motion, unwrap
from longvideo.evaluation.outline_matching import fold_angle, match_outlines, unit_area
from longvideo.evaluation.request import Request, RequestedSprite
from longvideo.evaluation.segmentation import (
    UNKNOWN,
    Background,
    Blob,
    dilate,
    find_blobs,
    fit_background,
    nearest_color,
)
from longvideo.shapeworld.world import COLORS, MOTIONS, ROUND_SHAPES, SHAPES, SIZES, WORLD_HEIGHT, Scene, Sprite

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ExpectedSprite = Sprite | RequestedSprite
ExpectedScene = Scene | Request

MAX_FRAMES = 32
LEAST_MATCH = 0.75
SIZE_BORDER = math.sqrt(SIZES["small"] * SIZES["large"])
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
MIN_PIXELS = 8
PATCH_MARGIN = 6


@dataclass(frozen=True)
class PerceivedSprite:
    """One object in a video. radius, center_x, center_y: medians, world units. match: correlation of its outline."""

    shape: str
    color: str
    size: str
    motion: str
    radius: float
    center_x: float
    center_y: float
    match: float


@dataclass(frozen=True)
class Percept:
    """The content of a clip. count: typical number of separate regions in a frame."""

    sprites: tuple[PerceivedSprite, ...]
    background: str
    count: int


@dataclass(frozen=True)
class Verdict:
    """Correctness of a clip.

    color, shape, size, motion: whether the property is correct for all expected objects; a property that the request
    does not mention is correct. count: whether the number of objects is correct. both: whether both objects of two have
    the correct color and shape; None for a scene with one object. pairs: each expected object with the perceived object
    that was matched to it, or None.
    """

    color: bool
    shape: bool
    size: bool
    motion: bool
    background: bool
    count: bool
    both: bool | None
    pairs: tuple[tuple[ExpectedSprite, PerceivedSprite | None], ...] = ()


def judge(frames: np.ndarray, scene: ExpectedScene, fps: float = 24.0, *, from_start: bool = True) -> Verdict:
    """Perceive frames uint8 [T, H, W, 3] and compare them with a scene; see `compare`."""
    return compare(perceive(frames, fps), scene, from_start=from_start)


def judge_all(videos: Sequence[np.ndarray], scenes: Sequence[Scene], fps: float) -> dict[str, float]:
    """Return the share of videos in which each property is correct."""
    verdicts = [judge(video, scene, fps) for video, scene in zip(videos, scenes, strict=True)]
    names = ("color", "shape", "size", "motion", "background")
    scores = {f"judge_{name}": float(np.mean([getattr(verdict, name) for verdict in verdicts])) for name in names}
    both = [verdict.both for verdict in verdicts if verdict.both is not None]
    return scores | ({"judge_both": float(np.mean(both))} if both else {})


def perceive(frames: np.ndarray, fps: float = 24.0) -> Percept:
    """Detect background and objects in frames uint8 [T, H, W, 3]. Motions need about 4 s to be recognized."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise UserError(f"frames are {frames.dtype} {list(frames.shape)}; expected uint8 [T, H, W, 3] with T >= 1")
    step = -(-len(frames) // MAX_FRAMES)
    chosen = frames[::step]
    background = fit_background(chosen)
    blobs, count = find_blobs(chosen, background)
    sprites = (perceive_sprite(chosen, blob, background, seconds_per_frame=step / fps) for blob in blobs)
    return Percept(tuple(sprite for sprite in sprites if sprite is not None), background.name, count)


def compare(percept: Percept, scene: ExpectedScene, *, from_start: bool = True) -> Verdict:
    """Compare a percept with a scene or request, each object with the one that matches it best.

    from_start: whether the clip begins with the scene. Later, a bouncing object may have turned back, so the opposite
    direction is also correct.
    """
    pairs = assign(scene.sprites, percept.sprites)

    def right(name: str) -> bool:
        return all(
            seen is not None and getattr(seen, name) in allowed(expected, name, from_start=from_start)
            for expected, seen in pairs
        )

    color, shape = right("color"), right("shape")
    return Verdict(
        color=color,
        shape=shape,
        size=right("size"),
        motion=right("motion"),
        background=scene.background in (None, percept.background),
        count=percept.count == len(scene.sprites) and len(percept.sprites) == len(scene.sprites),
        both=(color and shape) if len(scene.sprites) > 1 else None,
        pairs=pairs,
    )


def allowed(expected: ExpectedSprite, name: str, *, from_start: bool = True) -> tuple[str, ...]:
    """Return the correct values of a property. name: of the property; from_start: as in `compare`."""
    value = getattr(expected, name)
    if value is None:
        return {"size": tuple(SIZES), "motion": MOTIONS}[name]
    if name == "motion" and not from_start and expected.edge == "bounce" and value in OPPOSITE:
        return value, OPPOSITE[value]
    return (value,)


def assign(
    expected: tuple[ExpectedSprite, ...], seen: tuple[PerceivedSprite, ...]
) -> tuple[tuple[ExpectedSprite, PerceivedSprite | None], ...]:
    """Match each expected sprite to a different perceived one so that most properties are equal, color first."""
    candidates: list[PerceivedSprite | None] = [*seen, *([None] * len(expected))]
    worth = {"color": 4.5, "shape": 2.0, "size": 1.0, "motion": 1.0}

    def similarity(chosen: tuple[PerceivedSprite | None, ...]) -> float:
        return sum(
            0.1 + sum(weight * (getattr(b, name) in allowed(a, name)) for name, weight in worth.items())
            for a, b in zip(expected, chosen, strict=True)
            if b is not None
        )

    best = max(itertools.permutations(candidates, len(expected)), key=similarity)
    return tuple(zip(expected, best, strict=True))


def perceive_sprite(
    frames: np.ndarray, blob: Blob, background: Background, *, seconds_per_frame: float
) -> PerceivedSprite | None:
    """Measure one object: color by majority over frames, outline by mean correlation, motion by its track."""
    height, width = frames.shape[1:3]
    unit = WORLD_HEIGHT / height
    patches = cut_patches(frames, blob, background)
    solid = patches.solid
    pixels = solid.sum((1, 2))
    usable = pixels >= MIN_PIXELS
    if not usable.any():
        return None
    solid, pixels = solid[usable], pixels[usable].astype(np.float32)
    index = np.arange(solid.shape[1], dtype=np.float32)
    center = np.stack([solid.sum(2) @ index, solid.sum(1) @ index], 1) / pixels[:, None]
    match = match_outlines(patches.soft[usable], center, pixels)
    score = match.score_NS.mean(0)
    shape_index = int(score.argmax())
    shape = SHAPES[shape_index]
    radius = np.sqrt(pixels / unit_area(shape)) * unit
    position = (patches.corner[usable] + center + 0.5) * unit
    angle = None
    if shape not in ROUND_SHAPES:
        angle = np.unwrap(match.angle_NS[:, shape_index], period=fold_angle(shape))
    track = Track(
        time=blob.frames[usable] * seconds_per_frame,
        x=unwrap(position[:, 1], width * unit),
        y=unwrap(position[:, 0], WORLD_HEIGHT),
        radius=radius,
        angle=angle,
    )
    typical = float(np.median(radius))
    return PerceivedSprite(
        shape=shape if score[shape_index] >= LEAST_MATCH else UNKNOWN,
        color=name_color(patches.colors),
        size="large" if typical > SIZE_BORDER else "small",
        motion=read_motion(track) if len(track.time) > 2 else UNKNOWN,
        radius=typical,
        center_x=float(np.median(position[:, 1]) % (width * unit)),
        center_y=float(np.median(position[:, 0]) % WORLD_HEIGHT),
        match=float(score[shape_index]),
    )


@dataclass(frozen=True)
class Patches:
    """Square patches around an object, one for each frame, which is treated as a torus."""

    corner: np.ndarray  # [N, 2] row and column of the first pixel; may be negative
    soft: np.ndarray  # [N, P, P] coverage in [0, 1]
    solid: np.ndarray  # [N, P, P] bool, covered by half or more
    colors: np.ndarray  # [N, 3] in [0, 255], mean color of the object in each frame


def cut_patches(frames: np.ndarray, blob: Blob, background: Background) -> Patches:
    """Cut out an object; its coverage is each pixel's difference from the background relative to the object's."""
    middle_y, half_y = torus_extent(np.any(blob.masks, axis=2))
    middle_x, half_x = torus_extent(np.any(blob.masks, axis=1))
    half = int(min(max(half_y, half_x) + PATCH_MARGIN, min(frames.shape[1:3]) // 2 - 1))
    offset = np.arange(-half, half + 1)
    rows, columns = middle_y[:, None] + offset, middle_x[:, None] + offset

    def cut(pictures: Iterable[np.ndarray]) -> np.ndarray:
        places = zip(pictures, rows, columns, strict=False)
        return np.stack([p.take(r, 0, mode="wrap").take(c, 1, mode="wrap") for p, r, c in places])

    mask = cut(blob.masks)
    pictures = cut(frames[index] for index in blob.frames)
    bare = cut(itertools.repeat(background.picture_HW3, len(rows)))
    difference = pictures - bare
    strength = np.where(mask, np.einsum("nyxc,nyxc->nyx", difference, difference), 0.0)
    # squared differences of at least half of the largest: the object without its soft edge
    inner = strength >= np.maximum(0.5 * strength.max((1, 2), keepdims=True), 1.0)
    total = np.einsum("nyx,nyxc->nc", inner.astype(np.float32), pictures.astype(np.float32))
    colors = total / np.maximum(inner.sum((1, 2)), 1)[:, None]
    contrast = np.median(colors, axis=0).astype(np.float32) - bare
    cover = np.einsum("nyxc,nyxc->nyx", difference, contrast) / np.einsum("nyxc,nyxc->nyx", contrast, contrast)
    cover = np.where(dilate(mask), cover, 0.0)
    soft = np.clip(2 * cover - 0.5, 0, 1).astype(np.float32)
    return Patches(np.stack([rows[:, 0], columns[:, 0]], 1), soft, cover > 0.5, colors)


def torus_extent(occupied_NL: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the circular mean of each row of booleans, and the 95th percentile of the largest distances from it."""
    length = occupied_NL.shape[1]
    turn = 2 * math.pi * np.arange(length, dtype=np.float32) / length
    occupied = occupied_NL.astype(np.float32)
    middle = np.round(np.arctan2(occupied @ np.sin(turn), occupied @ np.cos(turn)) / (2 * math.pi) * length)
    middle = middle.astype(int) % length
    distance = np.abs((np.arange(length) - middle[:, None] + length // 2) % length - length // 2)
    reach = np.where(occupied_NL, distance, 0).max(1)
    return middle, int(np.percentile(reach, 95))


def name_color(colors_N3: np.ndarray) -> str:
    """Return the name of the color in most frames."""
    names = nearest_color(colors_N3.round().astype(np.uint8))
    known = names[names >= 0]
    if len(known) * 2 < len(names):
        return UNKNOWN
    return tuple(COLORS)[int(np.bincount(known).argmax())]
