"""Scenes as tensors, of which a trainer keeps tens of thousands on the GPU and selects some by index.

B scenes, N sprites (the largest number in any scene; missing ones have `present` 0).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.shapeworld.geometry import OUTLINE_FIELDS, outline_row
from longvideo.shapeworld.world import BACKGROUNDS, COLORS, MOTIONS, SIZES, Scene, Sprite

if TYPE_CHECKING:
    from collections.abc import Sequence

SPEED = (35.0, 45.0)
"""Speed in world units per second."""
PERIOD = (2.5, 4.0)
"""Period of an orbit, a zigzag or a pulse, seconds."""
SPIN_PERIOD = (3.0, 4.0)
ORBIT_RADIUS = (24.0, 32.0)
ORBIT_TOP = {"clockwise": 0.75, "counterclockwise": 0.25}
"""Phase at the highest point of the circle, turns."""
ORBIT_START_TURNS = 0.125
"""Largest distance in turns of an orbit's start from the highest point, so that the first motion shows the direction of
the orbit. With a start anywhere on the circle, single frames of both directions would look the same."""
ZIGZAG_AMPLITUDE = (20.0, 26.0)


@dataclass(frozen=True)
class SceneBatch:
    """The scenes of a batch. B is the first axis of every tensor, so indexing and moving apply to all of them."""

    background_B: Tensor
    present_BN: Tensor
    outline_BNF: Tensor  # geometry.OUTLINE_FIELDS
    motion_BN: Tensor
    wraps_BN: Tensor
    color_BN3: Tensor  # in [-1, 1]
    radius_BN: Tensor
    region_BN2: Tensor  # left and right end of the sprite's region, as fractions of the frame's width
    place_BN2: Tensor  # x and y as fractions of the free part of the region
    speed_BN: Tensor
    period_BN: Tensor
    phase_BN: Tensor  # in turns
    reach_BN: Tensor  # orbit radius, or amplitude of the zigzag
    direction_BN: Tensor  # +1 or -1, for the drift of a zigzag and for a spin
    lead_BN: Tensor  # 0: the first bounce is as early as allowed; 1: it is after the whole region is crossed

    @classmethod
    def from_scenes(cls, scenes: Sequence[Scene]) -> SceneBatch:
        """Build the tensors on the CPU. The seed of each scene determines layout, speeds and phases."""
        num_sprites = max(len(scene.sprites) for scene in scenes)
        rows = [_scene_rows(scene, num_sprites) for scene in scenes]
        sprites = torch.tensor(rows, dtype=torch.float64)
        column = {name: sprites[..., i] for i, name in enumerate(_COLUMNS)}

        def floats(*names: str) -> Tensor:
            return torch.stack([column[name] for name in names], -1).float().contiguous()

        return cls(
            background_B=torch.tensor([BACKGROUNDS.index(scene.background) for scene in scenes]),
            present_BN=floats("present").squeeze(-1),
            outline_BNF=floats(*OUTLINE_FIELDS),
            motion_BN=column["motion"].long(),
            wraps_BN=column["wraps"].bool(),
            color_BN3=floats("red", "green", "blue") / 127.5 - 1,
            radius_BN=floats("radius").squeeze(-1),
            region_BN2=floats("region_left", "region_right"),
            place_BN2=floats("place_x", "place_y"),
            speed_BN=floats("speed").squeeze(-1),
            period_BN=floats("period").squeeze(-1),
            phase_BN=floats("phase").squeeze(-1),
            reach_BN=floats("reach").squeeze(-1),
            direction_BN=floats("direction").squeeze(-1),
            lead_BN=floats("lead").squeeze(-1),
        )

    def outline_BN(self, name: str) -> Tensor:
        """Return one field of the outlines. name: one of OUTLINE_FIELDS."""
        return self.outline_BNF[..., OUTLINE_FIELDS.index(name)]

    def to(self, device: torch.device | str) -> SceneBatch:
        """Return the batch with all tensors on a device."""
        return SceneBatch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def __getitem__(self, index: Tensor | slice | list[int]) -> SceneBatch:
        """Select scenes by an index tensor, a list or a slice."""
        return SceneBatch(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def __len__(self) -> int:
        return self.background_B.shape[0]


_COLUMNS = (
    *(*OUTLINE_FIELDS, "present", "motion", "wraps", "red", "green", "blue", "radius", "region_left", "region_right"),
    *("place_x", "place_y", "speed", "period", "phase", "reach", "direction", "lead"),
)


def _scene_rows(scene: Scene, num_sprites: int) -> list[list[float]]:
    """Return a row of numbers for each of `num_sprites` sprites, in the order of _COLUMNS."""
    generator = random.Random(f"shapeworld layout {scene.seed}")
    swap = generator.random() < 0.5
    rows = []
    for i in range(num_sprites):
        region = (0.0, 1.0)
        if len(scene.sprites) > 1:
            region = (0.5, 1.0) if (i == 0) == swap else (0.0, 0.5)
        present = i < len(scene.sprites)
        sprite = scene.sprites[i if present else 0]
        rows.append([*outline_row(sprite.shape), float(present), *_sprite_row(sprite, region, generator)])
    return rows


def _sprite_row(sprite: Sprite, region: tuple[float, float], generator: random.Random) -> list[float]:
    def between(low: float, high: float) -> float:
        return low + (high - low) * generator.random()

    place = (generator.random(), generator.random())
    speed = between(*SPEED)
    period = between(*(SPIN_PERIOD if sprite.motion == "spinning" else PERIOD))
    phase = generator.random()
    if sprite.motion in ORBIT_TOP:
        phase = ORBIT_TOP[sprite.motion] + (2 * phase - 1) * ORBIT_START_TURNS
    reach = between(*(ZIGZAG_AMPLITUDE if sprite.motion == "zigzag" else ORBIT_RADIUS))
    direction = 1.0 if generator.random() < 0.5 else -1.0
    lead = generator.random()
    return [
        *(MOTIONS.index(sprite.motion), float(sprite.edge == "wrap")),
        *COLORS[sprite.color],
        *(SIZES[sprite.size], *region, *place, speed, period, phase, reach, direction, lead),
    ]
