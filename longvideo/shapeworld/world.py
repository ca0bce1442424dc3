"""The vocabulary and rules of ShapeWorld: contents of scenes, random scenes, and the held-out combinations.

A scene describes its objects; its seed determines their places, speeds and phases (see `batch.py`). Lengths are in
world units: the frame is 128 units high for any size in pixels.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeVar

from longvideo.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

WORLD_NAME = "ShapeWorld"
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (224, 32, 38),
    "orange": (255, 136, 10),
    "yellow": (255, 226, 40),
    "green": (34, 190, 66),
    "cyan": (24, 212, 232),
    "blue": (30, 90, 245),
    "purple": (156, 40, 196),
    "pink": (255, 124, 196),
}
SIZES: dict[str, float] = {"small": 11.0, "large": 20.0}
"""Nominal radius of each size in world units."""
MOTIONS = (
    "still",
    "left",
    "right",
    "up",
    "down",
    "clockwise",
    "counterclockwise",
    "spinning",
    "pulsing",
    "zigzag",
)
TRAVELING = ("left", "right", "up", "down", "zigzag")
"""Motions that reach the edge of the frame; only these use `Sprite.edge`."""
ROUND_SHAPES = ("circle", "ring")
"""Shapes for which spinning is not visible."""
Edge = Literal["bounce", "wrap"]
EDGES: tuple[Edge, ...] = ("bounce", "wrap")
BACKGROUNDS = ("black", "gray", "cream", "night", "meadow", "checkerboard")

WORLD_HEIGHT = 128.0
MAX_SPRITES = 2
SINGLE_SPRITE_SHARE = 0.65
HELD_OUT_MODULUS = 10

Split = Literal["train", "heldout"]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Sprite:
    """One object. edge: behavior at the border of the frame, used only by the motions in TRAVELING."""

    shape: str
    color: str
    size: str
    motion: str
    edge: Edge = "bounce"

    def __post_init__(self) -> None:
        check_word("shape", self.shape, SHAPES)
        check_word("color", self.color, tuple(COLORS))
        check_word("size", self.size, tuple(SIZES))
        check_word("motion", self.motion, MOTIONS)
        check_word("edge", self.edge, EDGES)
        if self.motion == "spinning" and self.shape in ROUND_SHAPES:
            raise UserError(
                f"spinning is not visible for a {self.shape}; use a shape other than {' and '.join(ROUND_SHAPES)}"
            )


@dataclass(frozen=True)
class Scene:
    """One or two sprites on a background. seed: determines places, phases, speeds and layout.

    Two sprites have different colors, stay in their own halves of the frame, and bounce.
    """

    sprites: tuple[Sprite, ...]
    background: str
    seed: int

    def __post_init__(self) -> None:
        check_word("background", self.background, BACKGROUNDS)
        if not 1 <= len(self.sprites) <= MAX_SPRITES:
            raise UserError(f"a scene has {len(self.sprites)} sprites; use 1 to {MAX_SPRITES}")
        if len({sprite.color for sprite in self.sprites}) < len(self.sprites):
            raise UserError(f"two sprites are {self.sprites[0].color}; use different colors")
        if len(self.sprites) > 1 and any(sprite.edge != "bounce" for sprite in self.sprites):
            raise UserError("one of two sprites has edge 'wrap', but each stays in its own half; use 'bounce'")


def sample_scene(seed: int, *, split: Split, num_sprites: int | None = None) -> Scene:
    """Draw the scene of a seed. Equal arguments give equal scenes.

    split: "train" scenes have no held-out sprite, "heldout" scenes have at least one. num_sprites: by default one for
    about 65 % of the seeds, and two for the others.
    """
    generator = random.Random(f"shapeworld scene {split} {seed}")
    background = pick(generator, BACKGROUNDS)
    single = generator.random() < SINGLE_SPRITE_SHARE
    count = num_sprites if num_sprites is not None else (1 if single else MAX_SPRITES)
    while True:
        sprites = _sample_sprites(generator, count)
        scene = Scene(sprites, background, seed)
        if is_held_out(scene) == (split == "heldout"):
            return scene


def sample_scenes(count: int, *, seed: int, split: Split, pair_fraction: float) -> list[Scene]:
    """Draw `count` scenes. pair_fraction: share of scenes with two sprites, evenly distributed."""
    scenes = []
    for index in range(count):
        pair = int((index + 1) * pair_fraction) > int(index * pair_fraction)
        scenes.append(sample_scene(seed * 10_000_000 + index, split=split, num_sprites=2 if pair else 1))
    return scenes


def recolor(scene: Scene) -> Scene:
    """Return the scene with another color of one sprite. A training scene does not become a held-out one.

    Equal scenes give equal results.
    """
    generator = random.Random(f"shapeworld color {scene.seed}")
    others = [
        replace(scene, sprites=(*scene.sprites[:index], replace(sprite, color=color), *scene.sprites[index + 1 :]))
        for index, sprite in enumerate(scene.sprites)
        for color in COLORS
        if color not in {other.color for other in scene.sprites}
    ]
    return pick(generator, [other for other in others if is_held_out(scene) or not is_held_out(other)])


def is_held_out(scene: Scene) -> bool:
    """Return whether a scene is held out from training, which is so if one of its sprites is."""
    return any(is_held_out_sprite(sprite) for sprite in scene.sprites)


def is_held_out_sprite(sprite: Sprite) -> bool:
    """Return whether a sprite is held out, which one in ten triples (shape, color, motion) is.

    The multipliers 1, 3 and 7 are units modulo 10, so each pair of two properties is held out with at most one value
    of the third. Training therefore includes every shape, color and motion, and every pair of these.
    """
    color = tuple(COLORS).index(sprite.color)
    code = SHAPES.index(sprite.shape) + 3 * color + 7 * MOTIONS.index(sprite.motion)
    return code % HELD_OUT_MODULUS == 0


def pick(generator: random.Random, items: Sequence[Item]) -> Item:
    """Choose one item. It uses only `random()`, whose sequence is the same in every version of Python."""
    return items[int(generator.random() * len(items))]


def check_word(name: str, word: str, words: Sequence[str]) -> None:
    """Raise UserError unless `word` is one of `words`."""
    if word not in words:
        raise UserError(f"{word!r} is not a {name}; use one of {', '.join(words)}")


def _sample_sprites(generator: random.Random, count: int) -> tuple[Sprite, ...]:
    colors = list(COLORS)
    sprites = []
    for _ in range(count):
        motion = pick(generator, MOTIONS)
        shape = pick(generator, [s for s in SHAPES if motion != "spinning" or s not in ROUND_SHAPES])
        color = colors.pop(int(generator.random() * len(colors)))
        size = pick(generator, tuple(SIZES))
        edge = pick(generator, EDGES)
        if count > 1 or motion not in TRAVELING:
            edge = "bounce"
        sprites.append(Sprite(shape, color, size, motion, edge))
    return tuple(sprites)
