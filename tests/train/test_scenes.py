"""Which scenes a run trains on."""

from __future__ import annotations

import pytest

from longvideo.errors import ConfigError
from longvideo.shapeworld.world import Scene, is_held_out
from longvideo.train.scenes import CIRCLING, SceneConfig, sample_scenes

COUNT = 400


def circles(scene: Scene) -> bool:
    return any(sprite.motion in CIRCLING for sprite in scene.sprites)


def test_fractions_are_kept_and_independent() -> None:
    scenes = sample_scenes(COUNT, seed=3, split="train", pair_fraction=0.45, circling_fraction=0.5)
    pairs = [scene for scene in scenes if len(scene.sprites) == 2]
    assert len(pairs) == COUNT * 0.45
    # a half is redrawn, and of the other half those that circle anyway: 0.2 of single sprites, 0.36 of pairs
    assert 0.5 <= sum(map(circles, scenes)) / COUNT < 0.7
    assert 0.55 < sum(map(circles, pairs)) / len(pairs) < 0.8
    assert not any(map(is_held_out, scenes))
    assert len({scene.seed for scene in scenes}) == COUNT


def test_no_fraction_leaves_chance() -> None:
    scenes = sample_scenes(COUNT, seed=3, split="train", pair_fraction=0.0)
    assert 0.12 < sum(map(circles, scenes)) / COUNT < 0.28


def test_equal_arguments_give_equal_scenes() -> None:
    def draw() -> list[Scene]:
        return sample_scenes(50, seed=1, split="heldout", pair_fraction=0.5, circling_fraction=0.3)

    assert draw() == draw()


@pytest.mark.parametrize("name", ["pair_fraction", "circling_fraction"])
def test_a_fraction_outside_its_range_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        SceneConfig(**{name: 1.5})
