"""See what a ShapeWorld video shows by classical vision alone, and compare it with what was asked for.

`perceive` knows the world's words and its renderer's outlines and backgrounds, never the prompt. It subtracts the
background, groups the rest into objects by connection and colour, matches outlines in polar coordinates and reads the
motion off the track. `compare` then asks, object by object, whether that is the scene.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from longvideo.errors import UserError
from longvideo.evaluation.motion_reading import Track, read_motion, unwrap
from longvideo.evaluation.outline_matching import fold_angle, match_outlines, unit_area
from longvideo.evaluation.segmentation import UNKNOWN, Background, Blob, dilate, find_blobs, fit_background, nearest_color
from longvideo.shapeworld.world import COLORS, ROUND_SHAPES, SHAPES, SIZES, WORLD_HEIGHT, Scene, Sprite

MAX_FRAMES = 48
LEAST_MATCH = 0.6
SIZE_BORDER = math.sqrt(SIZES["small"] * SIZES["large"])
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
MIN_PIXELS = 8


@dataclass(frozen=True)
class PerceivedSprite:
    """One object as seen. `radius` and the centre are medians in world units; `match` is its outline's correlation."""

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
    """What a clip shows. `count` is the typical number of separate regions in a frame."""

    sprites: tuple[PerceivedSprite, ...]
    background: str
    count: int


@dataclass(frozen=True)
class Verdict:
    """Answers about a clip. color, shape, size and motion ask for it of every object of the scene.

    `both` says whether both objects of a scene of two are there in the right colour and shape; None for one object.
    `pairs` holds each asked sprite with the one taken for it, or None when it is missing.
    """

    color: bool
    shape: bool
    size: bool
    motion: bool
    background: bool
    count: bool
    both: bool | None
    pairs: tuple[tuple[Sprite, PerceivedSprite | None], ...] = ()


def judge(frames: np.ndarray, scene: Scene, fps: float = 24.0, *, from_start: bool = True) -> Verdict:
    """Perceive uint8 [T, H, W, 3] frames and compare them with `scene`; see `compare`."""
    return compare(perceive(frames, fps), scene, from_start=from_start)


def perceive(frames: np.ndarray, fps: float = 24.0) -> Percept:
    """Find background and objects in uint8 [T, H, W, 3] frames. Motions need about 4 s to show."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise UserError(f"frames are {frames.dtype} {list(frames.shape)}; wanted uint8 [T, H, W, 3] with T >= 1")
    step = -(-len(frames) // MAX_FRAMES)
    chosen = frames[::step]
    background = fit_background(chosen)
    blobs, count = find_blobs(chosen, background)
    sprites = (perceive_sprite(chosen, blob, background, seconds_per_frame=step / fps) for blob in blobs)
    return Percept(tuple(sprite for sprite in sprites if sprite is not None), background.name, count)


def compare(percept: Percept, scene: Scene, *, from_start: bool = True) -> Verdict:
    """Compare a percept with a scene, each object with the one that suits it best.

    A bouncing object has turned round at some later time: without `from_start` its opposite direction counts too.
    """
    pairs = assign(scene.sprites, percept.sprites)
    found = [sprite for _, sprite in pairs]

    def right(name: str) -> bool:
        return all(seen is not None and getattr(seen, name) == getattr(asked, name) for asked, seen in pairs)

    color, shape = right("color"), right("shape")
    motion = all(
        seen is not None and seen.motion in allowed_motions(asked, from_start=from_start) for asked, seen in pairs
    )
    return Verdict(
        color=color,
        shape=shape,
        size=right("size"),
        motion=motion,
        background=percept.background == scene.background,
        count=percept.count == len(scene.sprites) and len(percept.sprites) == len(scene.sprites),
        both=(color and shape and None not in found) if len(scene.sprites) > 1 else None,
        pairs=pairs,
    )


def allowed_motions(asked: Sprite, *, from_start: bool) -> set[str]:
    """Return the motions that count as the one asked for."""
    is_turning = not from_start and asked.edge == "bounce" and asked.motion in OPPOSITE
    return {asked.motion, OPPOSITE[asked.motion]} if is_turning else {asked.motion}


def assign(
    asked: tuple[Sprite, ...], seen: tuple[PerceivedSprite, ...]
) -> tuple[tuple[Sprite, PerceivedSprite | None], ...]:
    """Pair the asked sprites with distinct seen ones so that most properties agree."""
    candidates: list[PerceivedSprite | None] = [*seen, *([None] * len(asked))]

    def agreement(chosen: tuple[PerceivedSprite | None, ...]) -> float:
        return sum(
            0.1 + 4 * (b.color == a.color) + 2 * (b.shape == a.shape) + (b.size == a.size) + (b.motion == a.motion)
            for a, b in zip(asked, chosen, strict=True)
            if b is not None
        )

    best = max(itertools.permutations(candidates, len(asked)), key=agreement)
    return tuple(zip(asked, best, strict=True))


def perceive_sprite(
    frames: np.ndarray, blob: Blob, background: Background, *, seconds_per_frame: float
) -> PerceivedSprite | None:
    """Measure one object: colour by majority over frames, outline by mean correlation, motion by its track."""
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
    """Square cut-outs round an object, one a frame, taken from the frame as a torus."""

    corner: np.ndarray  # [N, 2] row and column of the first pixel; may be negative
    soft: np.ndarray  # [N, P, P] coverage in [0, 1]
    solid: np.ndarray  # [N, P, P] bool, covered by half or more
    colors: np.ndarray  # [N, 3] uint8, typical colour of the object in each frame


def cut_patches(frames: np.ndarray, blob: Blob, background: Background) -> Patches:
    """Cut the object out and divide each pixel's difference from the background by the object's own."""
    height, width = frames.shape[1:3]
    middle_y, half_y = torus_extent(blob.masks.sum(2))
    middle_x, half_x = torus_extent(blob.masks.sum(1))
    half = int(min(max(half_y, half_x) + 6, min(height, width) // 2 - 1))
    offset = np.arange(-half, half + 1)
    corner = np.stack([middle_y - half, middle_x - half], 1)
    rows = ((middle_y[:, None] + offset) % height)[:, :, None]
    columns = ((middle_x[:, None] + offset) % width)[:, None, :]
    mask = blob.masks[np.arange(len(rows))[:, None, None], rows, columns]
    pictures = frames[blob.frames[:, None, None], rows, columns]
    bare = background.picture_HW3[rows, columns]
    difference = pictures.astype(np.float32) - bare
    strength = np.where(mask, np.einsum("nyxc,nyxc->nyx", difference, difference), 0.0)
    # the half of the object that differs most is free of the soft edge
    colors = np.stack([inner_color(p, s) for p, s in zip(pictures, strength, strict=True)])
    contrast = np.median(colors, axis=0).astype(np.float32) - bare
    cover = np.einsum("nyxc,nyxc->nyx", difference, contrast) / np.einsum("nyxc,nyxc->nyx", contrast, contrast)
    near = dilate(mask)
    cover = np.where(near, cover, 0.0)
    return Patches(corner, np.clip(2 * cover - 0.5, 0, 1).astype(np.float32), cover > 0.5, colors)


def inner_color(picture: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Median colour of the stronger half of the pixels with positive strength."""
    positive = strength[strength > 0]
    return np.median(picture[strength >= max(np.median(positive), 1e-6)], axis=0).astype(np.uint8)


def torus_extent(counts_NL: np.ndarray) -> tuple[np.ndarray, int]:
    """Circular mean of each row of counts, and the greatest distance from it that the typical row reaches."""
    length = counts_NL.shape[1]
    turn = np.exp(2j * math.pi * np.arange(length) / length)
    middle = np.round(np.angle(counts_NL @ turn) / (2 * math.pi) * length).astype(int) % length
    distance = np.abs((np.arange(length) - middle[:, None] + length // 2) % length - length // 2)
    reach = np.where(counts_NL > 0, distance, 0).max(1)
    return middle, int(np.percentile(reach, 95))


def name_color(colors_N3: np.ndarray) -> str:
    """Name the colour that most frames show."""
    names = nearest_color(colors_N3)
    known = names[names >= 0]
    if len(known) * 2 < len(names):
        return UNKNOWN
    return tuple(COLORS)[int(np.bincount(known).argmax())]
