"""Describe a scene in one of many ways, in plain lowercase English with commas and periods and under 40 words.

Every phrase is a literal of the tables below, so `vocabulary()` is complete. A color is always named by its own word,
and a shape by its own word or a synonym. A bounce is always mentioned, a wrap sometimes.
"""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING

from longvideo.shapeworld.world import COLORS, TRAVELING, Scene, Sprite, pick

if TYPE_CHECKING:
    from collections.abc import Iterable

SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "small", "tiny", "little"),
    "large": ("large", "big", "huge"),
}
SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "circle", "disc", "disk", "ball", "dot"),
    "square": ("square", "square", "box", "block"),
    "triangle": ("triangle", "triangle", "triangle", "pyramid"),
    "star": ("star", "star", "star", "five pointed star"),
    "cross": ("cross", "cross", "plus sign", "plus"),
    "ring": ("ring", "ring", "hoop", "donut"),
}
# For each motion, verbs with their complements. A verb is a pair of forms: "moves" and "moving".
Verb = tuple[str, str]
_GOING: tuple[Verb, ...] = (
    ("moves", "moving"),
    ("drifts", "drifting"),
    ("glides", "gliding"),
    ("slides", "sliding"),
    ("travels", "travelling"),
    ("floats", "floating"),
    ("goes", "going"),
    ("flies", "flying"),
)
MOTION_VERBS: dict[str, tuple[tuple[tuple[Verb, ...], tuple[str, ...]], ...]] = {
    "still": (
        ((("stays", "staying"), ("sits", "sitting"), ("stands", "standing"), ("holds", "holding")), ("still",)),
        ((("rests", "resting"), ("sits", "sitting"), ("stays", "staying")), ("in place", "without moving")),
        ((("does not move", "not moving"), ("is motionless", "motionless"), ("is still", "standing still")), ("",)),
    ),
    "left": ((_GOING, ("left", "left", "left", "to the left", "towards the left", "leftward")),),
    "right": ((_GOING, ("right", "right", "right", "to the right", "towards the right", "rightward")),),
    "up": (
        (_GOING, ("up", "up", "upward", "upwards", "to the top")),
        ((("rises", "rising"), ("climbs", "climbing")), ("",)),
    ),
    "down": (
        (_GOING, ("down", "down", "downward", "downwards", "to the bottom")),
        ((("falls", "falling"), ("sinks", "sinking"), ("descends", "descending")), ("",)),
    ),
    "clockwise": (
        ((("circles", "circling"), ("orbits", "orbiting"), ("loops", "looping")), ("clockwise",)),
        ((("goes around", "going around"), ("moves in a circle", "moving in a circle")), ("clockwise",)),
        ((("moves", "moving"), ("travels", "travelling")), ("in a clockwise circle", "clockwise in a circle")),
    ),
    "counterclockwise": (
        (
            (("circles", "circling"), ("orbits", "orbiting"), ("loops", "looping"), ("goes around", "going around")),
            ("counterclockwise", "counterclockwise", "anticlockwise"),
        ),
        (
            (("moves", "moving"), ("travels", "travelling")),
            ("in a counterclockwise circle", "counterclockwise in a circle", "in an anticlockwise circle"),
        ),
    ),
    "spinning": (
        (
            (("spins", "spinning"), ("rotates", "rotating"), ("turns", "turning"), ("whirls", "whirling")),
            ("in place", "on the spot", "around itself"),
        ),
        ((("spins", "spinning"), ("rotates", "rotating")), ("",)),
    ),
    "pulsing": (
        ((("pulses", "pulsing"), ("pulsates", "pulsating"), ("throbs", "throbbing")), ("", "in place")),
        ((("grows and shrinks", "growing and shrinking"), ("swells and shrinks", "swelling and shrinking")), ("",)),
        ((("gets bigger and smaller", "getting bigger and smaller"),), ("",)),
    ),
    "zigzag": (
        ((("zigzags", "zigzagging"),), ("", "sideways", "up and down")),
        ((("moves", "moving"), ("travels", "travelling"), ("flies", "flying")), ("in a zigzag", "in zigzags")),
        ((("follows", "following"),), ("a zigzag path",)),
    ),
}
# The first form of a pair follows "moves", the second follows "moving".
BOUNCES: tuple[Verb, ...] = (
    (", bouncing off the walls", ", bouncing off the walls"),
    (", bouncing off the edges", ", bouncing off the edges"),
    (" and bounces off the walls", " and bouncing off the walls"),
    (" and bounces off the edges", " and bouncing off the edges"),
    (" and bounces back at the edges", " and bouncing back at the edges"),
    (" bouncing off the sides", " bouncing off the sides"),
)
BOTH_BOUNCE = (", both bouncing off the walls", ", both bouncing off the edges")
WRAPS: tuple[Verb, ...] = (
    ("", ""),
    ("", ""),
    (", wrapping around", ", wrapping around"),
    (" and wraps around the edges", " and wrapping around the edges"),
    (", coming back on the other side", ", coming back on the other side"),
    (" and comes back on the other side", " and coming back on the other side"),
    (", reappearing on the opposite side", ", reappearing on the opposite side"),
)
BACKDROPS: dict[str, tuple[str, ...]] = {
    "black": (
        "a black background",
        "a black background",
        "a black background",
        "a plain black background",
        "an empty black background",
    ),
    "gray": ("a gray background", "a grey background", "a plain gray background", "a plain grey background"),
    "cream": ("a cream background", "a pale cream background", "a beige background", "an ivory background"),
    "night": ("a night sky", "the night sky", "a dark night sky", "a navy sky"),
    "meadow": ("a meadow", "a grassy meadow", "a dark meadow", "a field of grass", "a grass field"),
    "checkerboard": ("a checkerboard", "a dark checkerboard", "a checkered background", "a checkered floor"),
}
PREPOSITIONS: dict[str, tuple[str, ...]] = {
    "black": ("over", "on", "against", "in front of"),
    "gray": ("over", "on", "against", "in front of"),
    "cream": ("over", "on", "against", "in front of"),
    "night": ("against", "under", "in", "in front of"),
    "meadow": ("over", "above", "in", "in front of"),
    "checkerboard": ("over", "on", "above", "against"),
}
SPECIAL_PLACES: dict[str, tuple[str, ...]] = {"night": ("at night", "in the night"), "meadow": ("on the grass",)}
ONE_SPRITE = (
    "{a} {does}{edge_does} {place}",
    "{a} {does} {place}{edge_does}",
    "{a} {doing}{edge_doing} {place}",
    "{a} {doing} {place}{edge_doing}",
    "{place}, {a} {does}{edge_does}",
    "{a} {place} {does}{edge_does}",
    "{backdrop}. {a} {does}{edge_does}",
    "{backdrop} with {a} {doing}{edge_doing}",
    "there is {a} {doing} {place}{edge_doing}",
)
TWO_SPRITES = (
    "{a} {does}{edge_does} and {b} {b_does}{b_edge_does} {place}",
    "{a} {does}{edge_does} while {b} {b_does}{b_edge_does} {place}",
    "{place}, {a} {does}{edge_does} while {b} {b_does}{b_edge_does}",
    "{place}, {a} {does}{edge_does} and {b} {b_does}{b_edge_does}",
    "{a} {doing}{edge_doing} and {b} {b_doing}{b_edge_doing} {place}",
    "{backdrop} with {a} {doing}{edge_doing} and {b} {b_doing}{b_edge_doing}",
    "{backdrop}. {a} {does}{edge_does}. {b} {b_does}{b_edge_does}",
    "{a} {does}{edge_does} {place}. {b} {b_does}{b_edge_does}",
)
BOTH_SPRITES = (
    "{a} {does} and {b} {b_does} {place}{both}",
    "{a} {does} while {b} {b_does}{both} {place}",
    "{place}, {a} {does} and {b} {b_does}{both}",
    "{a} {doing} and {b} {b_doing} {place}{both}",
)
ARTICLES = ("a", "an")
END_SHARE = 0.4
"""Share of captions of one sentence that end with a period."""


def caption(scene: Scene, seed: int, *, omit: float = 0.0) -> str:
    """Describe a scene. Equal arguments give equal captions.

    omit: probability of omitting the sizes, and of omitting the background, as users often do.
    """
    generator = random.Random(f"shapeworld caption {seed}")
    say_size = generator.random() >= omit
    say_place = generator.random() >= omit
    words = {"place": "", "backdrop": ""}
    if say_place:
        words = {"place": _place(scene.background, generator), "backdrop": pick(generator, BACKDROPS[scene.background])}
    order = list(scene.sprites)
    if generator.random() < 0.5:
        order.reverse()
    for prefix, name, sprite in zip(("", "b_"), ("a", "b"), order, strict=False):
        words[name] = _subject(sprite, generator, say_size=say_size)
        words |= _deeds(sprite, generator, prefix=prefix)
    templates = ONE_SPRITE
    if len(order) > 1:
        templates = TWO_SPRITES
        if all(sprite.motion in TRAVELING for sprite in order) and generator.random() < 0.5:
            templates = BOTH_SPRITES
            words["both"] = pick(generator, BOTH_BOUNCE)
    if not say_place:
        templates = tuple(template for template in templates if "{backdrop}" not in template)
    sentence = pick(generator, templates).format(**words)
    sentence = re.sub(r"\s+(?=[,.]|$)", "", " ".join(sentence.split())).removeprefix(", ")
    return sentence + ("." if "." in sentence or generator.random() < END_SHARE else "")


def vocabulary() -> list[str]:
    """Return all words that `caption` can use, sorted, without punctuation."""
    return sorted({word for phrase in _phrases() for word in re.findall(r"[a-z]+", phrase)})


def _subject(sprite: Sprite, generator: random.Random, *, say_size: bool) -> str:
    size = pick(generator, SIZE_WORDS[sprite.size])
    shape = pick(generator, SHAPE_WORDS[sprite.shape])
    name = f"{size} {sprite.color} {shape}" if say_size else f"{sprite.color} {shape}"
    return f"{ARTICLES[name[0] in 'aeiou']} {name}"


def _deeds(sprite: Sprite, generator: random.Random, *, prefix: str) -> dict[str, str]:
    verbs, ways = pick(generator, MOTION_VERBS[sprite.motion])
    does, doing = pick(generator, verbs)
    way = pick(generator, ways)
    edges = BOUNCES if sprite.edge == "bounce" else WRAPS
    edge_does, edge_doing = pick(generator, edges) if sprite.motion in TRAVELING else ("", "")
    forms = {"does": f"{does} {way}".strip(), "doing": f"{doing} {way}".strip()}
    forms |= {"edge_does": edge_does, "edge_doing": edge_doing}
    return {prefix + name: form for name, form in forms.items()}


def _place(background: str, generator: random.Random) -> str:
    special = SPECIAL_PLACES.get(background, ())
    index = int(generator.random() * (len(special) + 6))
    if index < len(special):
        return special[index]
    return f"{pick(generator, PREPOSITIONS[background])} {pick(generator, BACKDROPS[background])}"


def _phrases() -> Iterable[str]:
    """Yield all literals of this module that can be part of a caption."""
    yield from ARTICLES
    yield from COLORS
    for table in (SIZE_WORDS, SHAPE_WORDS, BACKDROPS, PREPOSITIONS, SPECIAL_PLACES):
        for phrases in table.values():
            yield from phrases
    for groups in MOTION_VERBS.values():
        for verbs, ways in groups:
            for verb in verbs:
                yield from verb
            yield from ways
    for pair in (*BOUNCES, *WRAPS):
        yield from pair
    yield from BOTH_BOUNCE
    for template in (*ONE_SPRITE, *TWO_SPRITES, *BOTH_SPRITES):
        yield re.sub(r"\{\w+\}", " ", template)
