"""Poses of all sprites at any time, an exact function of scene and time, in world units.

B scenes, T times, N sprites. Phases are wrapped before they are scaled, so precision does not decrease with time.
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.shapeworld.world import MOTIONS, WORLD_HEIGHT

if TYPE_CHECKING:
    from longvideo.shapeworld.batch import SceneBatch

FIRST_BOUNCE_SECONDS = 1.5
"""Shortest time before a sprite's first bounce, so that its direction is visible."""
PULSE = 0.28
"""Relative amplitude of the radius of a pulsing sprite."""
HALF_GAP = 2.0
"""Distance from the middle of the frame that each of two sprites keeps."""


@dataclass(frozen=True)
class SpritePoses:
    """Center, radius (world units) and angle (radians, clockwise) of every sprite at every time."""

    x_BTN: Tensor
    y_BTN: Tensor
    radius_BTN: Tensor
    angle_BTN: Tensor


def compute_poses(batch: SceneBatch, times_BT: Tensor, *, width: float) -> SpritePoses:
    """Compute the poses of all sprites, in the dtype of the times.

    times_BT: seconds. width: of the frame, world units.
    """
    dtype = times_BT.dtype
    time = times_BT[..., None]

    def column(values_BN: Tensor) -> Tensor:
        return values_BN.to(dtype)[:, None]

    def moves(*names: str) -> Tensor:
        return _moves(batch, *names)[:, None]

    region = _Region.of(batch, width)
    low_x, high_x = column(region.low_x), column(region.high_x)
    low_y, high_y = column(region.low_y), column(region.high_y)
    speed, lead, wraps = column(batch.speed_BN), column(batch.lead_BN), batch.wraps_BN[:, None]
    turns = time / column(batch.period_BN) + column(batch.phase_BN)
    orbits, zigzags = moves("clockwise", "counterclockwise"), moves("zigzag")

    half_x, half_y = (high_x - low_x) / 2, (high_y - low_y) / 2
    reach_y = torch.where(orbits | zigzags, torch.minimum(column(batch.reach_BN), half_y), 0.0)
    reach_y = torch.where(orbits, torch.minimum(reach_y, half_x), reach_y)
    reach_x = torch.where(orbits, reach_y, 0.0)
    place_x, place_y = column(batch.place_BN2[..., 0]), column(batch.place_BN2[..., 1])
    x = low_x + reach_x + place_x * 2 * (half_x - reach_x)
    y = low_y + reach_y + place_y * 2 * (half_y - reach_y)

    orbit_angle = 2 * math.pi * _fraction(torch.where(moves("counterclockwise"), -turns, turns))
    swing = 2 * _triangle_wave(turns) - 1
    travel_x = torch.where(moves("left"), -1.0, torch.where(moves("right"), 1.0, column(batch.direction_BN)))
    travel_y = torch.where(moves("up"), -1.0, 1.0).to(dtype)
    along_x = _travel(x, time, low_x, high_x, travel_x, speed=speed, lead=lead, wraps=wraps, size=width)
    along_y = _travel(y, time, low_y, high_y, travel_y, speed=speed, lead=lead, wraps=wraps, size=WORLD_HEIGHT)
    x = torch.where(moves("left", "right", "zigzag"), along_x, x + reach_x * torch.cos(orbit_angle))
    y = torch.where(orbits, y + reach_y * torch.sin(orbit_angle), torch.where(zigzags, y + reach_y * swing, y))
    y = torch.where(moves("up", "down"), along_y, y)

    pulse = torch.where(moves("pulsing"), 1 + PULSE * torch.sin(2 * math.pi * _fraction(turns)), 1.0)
    spin_turns = time / column(batch.period_BN) * column(batch.direction_BN)
    angle = torch.where(moves("spinning"), 2 * math.pi * _fraction(spin_turns), 0.0)
    return SpritePoses(x, y, column(batch.radius_BN) * pulse, angle.to(dtype))


@dataclass(frozen=True)
class _Region:
    """Bounds [B, N] of a sprite's center that keep the whole sprite inside of its region of the frame."""

    low_x: Tensor
    high_x: Tensor
    low_y: Tensor
    high_y: Tensor

    @classmethod
    def of(cls, batch: SceneBatch, width: float) -> _Region:
        radius = batch.radius_BN * torch.where(_moves(batch, "pulsing"), 1 + PULSE, 1.0)
        spins = _moves(batch, "spinning")

        def extent(name: str) -> Tensor:
            return radius * torch.where(spins, batch.outline_BN("bound"), batch.outline_BN(name))

        left, right = batch.region_BN2[..., 0], batch.region_BN2[..., 1]
        low_x = left * width + torch.where(left > 0, HALF_GAP, 0.0) + extent("half_width")
        high_x = right * width - torch.where(right < 1, HALF_GAP, 0.0) - extent("half_width")
        low_y, high_y = extent("above"), WORLD_HEIGHT - extent("below")
        return cls(low_x, torch.maximum(low_x, high_x), low_y, torch.maximum(low_y, high_y))


def _moves(batch: SceneBatch, *names: str) -> Tensor:
    """Return whether each sprite has one of the motions, bool [B, N]. No tensor is created on the host."""
    code = batch.motion_BN
    return functools.reduce(operator.or_, [code == MOTIONS.index(name) for name in names])


def _travel(
    start: Tensor,
    time: Tensor,
    low: Tensor,
    high: Tensor,
    direction: Tensor,
    *,
    speed: Tensor,
    lead: Tensor,
    wraps: Tensor,
    size: float,
) -> Tensor:
    """Return positions along one axis: wrapping at length `size`, or bouncing between low and high."""
    wrapped = size * _fraction(start / size + direction * time * (speed / size))
    length = (high - low).clamp_min(torch.finfo(torch.float32).eps)
    slow = torch.minimum(speed, length / FIRST_BOUNCE_SECONDS)
    first_bounce = FIRST_BOUNCE_SECONDS + lead * (length / slow - FIRST_BOUNCE_SECONDS)
    # half a period is one crossing; the wave is 0 at the edge in the back and 1 at the edge in front
    crossed = 0.5 + (time - first_bounce) * (slow / length) / 2
    progress = length * _triangle_wave(crossed)
    bounced = torch.where(direction > 0, low + progress, high - progress)
    return torch.where(wraps, wrapped, bounced)


def _fraction(turns: Tensor) -> Tensor:
    return turns - torch.floor(turns)


def _triangle_wave(turns: Tensor) -> Tensor:
    """Return a triangle wave: 0 at whole turns, 1 halfway between them, linear in between."""
    return 1 - (2 * _fraction(turns) - 1).abs()
