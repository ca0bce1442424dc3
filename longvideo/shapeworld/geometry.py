"""One formula for all six shapes: the signed distance to a folded half plane, or to a ring.

A shape with n-fold symmetry is folded into half of a sector, 0 <= angle <= pi / n, where its outline is one straight
line (two for the cross). Therefore one expression describes every polygon, with tables instead of branches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

UNBOUNDED = 1e3


@dataclass(frozen=True)
class Outline:
    """A shape of nominal radius 1. Positive angles are clockwise on the screen, because y points down."""

    folds: int = 1
    upright: float = 0.0  # angle of the fold's axis when the shape is upright
    normal_x: float = 0.0  # the half plane normal . p <= offset in the folded sector
    normal_y: float = 0.0
    offset: float = UNBOUNDED
    ceiling: float = UNBOUNDED  # additional bound y <= ceiling in the folded sector
    band_radius: float = 0.0  # round shapes: | |p| - band_radius | <= band_half
    band_half: float = UNBOUNDED
    half_width: float = 1.0  # extents from the center, upright
    above: float = 1.0
    below: float = 1.0
    bound: float = 1.0  # radius of the circle around the center that contains the shape at any angle


def _square(half: float) -> Outline:
    bound = half * math.sqrt(2)
    return Outline(4, 0.0, 1.0, 0.0, half, half_width=half, above=half, below=half, bound=bound)


def _triangle(tip: float) -> Outline:
    width = tip * math.cos(math.pi / 6)
    return Outline(3, math.pi / 2, 1.0, 0.0, tip / 2, half_width=width, above=tip, below=tip / 2, bound=tip)


def _star(tip: float, notch: float) -> Outline:
    notch_x, notch_y = notch * math.cos(math.pi / 5), notch * math.sin(math.pi / 5)
    length = math.hypot(tip - notch_x, notch_y)
    normal_x, normal_y = notch_y / length, (tip - notch_x) / length
    width, below = tip * math.cos(math.pi / 10), tip * math.cos(math.pi / 5)
    return Outline(
        *(5, -math.pi / 2, normal_x, normal_y, normal_x * tip), half_width=width, above=tip, below=below, bound=tip
    )


def _cross(arm: float, half: float) -> Outline:
    bound = math.hypot(arm, half)
    return Outline(4, 0.0, 1.0, 0.0, arm, half, half_width=arm, above=arm, below=arm, bound=bound)


def _band(inner: float, outer: float) -> Outline:
    middle, half = (inner + outer) / 2, (outer - inner) / 2
    return Outline(band_radius=middle, band_half=half, half_width=outer, above=outer, below=outer, bound=outer)


OUTLINES: dict[str, Outline] = {
    "circle": _band(-1.0, 1.0),
    "square": _square(0.88),
    "triangle": _triangle(1.3),
    "star": _star(1.26, 0.6),
    "cross": _cross(1.1, 0.4),
    "ring": _band(0.58, 1.06),
}


OUTLINE_FIELDS = tuple(field.name for field in fields(Outline))


def outline_row(shape: str) -> list[float]:
    """Return the fields of a shape in the order of OUTLINE_FIELDS."""
    return [float(getattr(OUTLINES[shape], name)) for name in OUTLINE_FIELDS]


def signed_distance(x: Tensor, y: Tensor, *, outline_BF: Tensor, radius: Tensor, angle: Tensor) -> Tensor:
    """Return the distance to the outline, negative inside; exact at straight and round edges, mitered at corners.

    x, y: offsets from the center, [B, T, H, W] after broadcasting. radius, angle: [B, T, 1, 1]. F is OUTLINE_FIELDS.
    """

    def number(name: str) -> Tensor:
        return outline_BF[:, OUTLINE_FIELDS.index(name), None, None, None]

    distance = torch.sqrt(x * x + y * y)
    sector = 2 * math.pi / number("folds")
    turn = (torch.atan2(y, x) - angle - number("upright")) / sector
    folded = (turn - torch.round(turn)).abs() * sector
    along, across = distance * torch.cos(folded), distance * torch.sin(folded)
    half_plane = number("normal_x") * along + number("normal_y") * across - number("offset") * radius
    ceiling = across - number("ceiling") * radius
    band = (distance - number("band_radius") * radius).abs() - number("band_half") * radius
    return torch.maximum(torch.maximum(half_plane, ceiling), band)
