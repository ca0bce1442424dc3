"""Parse ShapeWorld captions, so that a folder of videos can be judged by its captions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from longvideo.errors import UserError
from longvideo.shapeworld.captions import (
    BACKDROPS,
    BOTH_BOUNCE,
    BOUNCES,
    MOTION_VERBS,
    SHAPE_WORDS,
    SIZE_WORDS,
    SPECIAL_PLACES,
)
from longvideo.shapeworld.world import COLORS, MAX_SPRITES, Edge

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True)
class RequestedSprite:
    """One object of a caption. A property is None if the caption does not mention it."""

    shape: str
    color: str
    size: str | None
    motion: str | None
    edge: Edge = "bounce"


@dataclass(frozen=True)
class Request:
    """The content of a caption. background: None if the caption does not mention it."""

    sprites: tuple[RequestedSprite, ...]
    background: str | None


def read_caption(text: str) -> Request:
    """Parse the objects, their motions and the background. Raises UserError if the caption has no colored shape."""
    words = " ".join(re.findall(r"[a-z]+|[.,]", text.lower()))
    subjects = list(subject_pattern().finditer(words))
    if not 1 <= len(subjects) <= MAX_SPRITES:
        raise UserError(
            f"the caption {text!r} has {len(subjects)} colored shapes, expected 1 to {MAX_SPRITES}; use captions of"
            " ShapeWorld"
        )
    ends = [match.start() for match in subjects[1:]] + [len(words)]
    bounces = {phrase(edge) for pair in BOUNCES for edge in pair}
    all_bounce = any(phrase(both) in words for both in BOTH_BOUNCE)
    sprites = []
    for match, end in zip(subjects, ends, strict=True):
        deeds = words[match.end() : end]
        bounce = all_bounce or any(edge in deeds for edge in bounces)
        sprites.append(
            RequestedSprite(
                shape=named(match["shape"], SHAPE_WORDS) or "",
                color=match["color"],
                size=named(match["size"] or "", SIZE_WORDS),
                motion=named(deeds, motion_phrases()),
                edge="bounce" if bounce else "wrap",
            )
        )
    places = {name: (*BACKDROPS[name], *SPECIAL_PLACES.get(name, ())) for name in BACKDROPS}
    return Request(tuple(sprites), named(words, places))


def named(text: str, phrases: Mapping[str, Iterable[str]]) -> str | None:
    """Return the name with the longest phrase that occurs in a text; None if no phrase occurs."""
    padded = f" {text} "
    matches = [(len(p), name) for name, options in phrases.items() for p in options if f" {phrase(p)} " in padded]
    return max(matches)[1] if matches else None


@cache
def phrase(text: str) -> str:
    """Separate words and punctuation by single spaces, as in the caption that is searched."""
    return " ".join(re.findall(r"[a-z]+|[.,]", text))


@lru_cache(maxsize=1)
def subject_pattern() -> re.Pattern[str]:
    """Return the pattern of an optional size, a color and a shape."""

    def one_of(options: Iterable[str]) -> str:
        return "|".join(sorted({phrase(option) for option in options}, key=len, reverse=True))

    sizes = one_of(word for words in SIZE_WORDS.values() for word in words)
    shapes = one_of(word for words in SHAPE_WORDS.values() for word in words)
    return re.compile(rf"\b(?:(?P<size>{sizes}) )?(?P<color>{one_of(COLORS)}) (?P<shape>{shapes})\b")


@lru_cache(maxsize=1)
def motion_phrases() -> dict[str, tuple[str, ...]]:
    """Return all phrases of captions for each motion."""
    return {
        motion: tuple(f"{form} {way}".strip() for verbs, ways in groups for v in verbs for form in v for way in ways)
        for motion, groups in MOTION_VERBS.items()
    }
