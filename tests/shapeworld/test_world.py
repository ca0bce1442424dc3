"""Random scenes follow their rules, and the held-out rule excludes the right combinations."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest

from longvideo.errors import UserError
from longvideo.shapeworld.world import (
    COLORS,
    MOTIONS,
    ROUND_SHAPES,
    SHAPES,
    TRAVELING,
    Scene,
    Sprite,
    is_held_out,
    is_held_out_sprite,
    recolor,
    sample_scene,
)

ALL_SPRITES = [
    Sprite(shape, color, "small", motion)
    for shape, color, motion in itertools.product(SHAPES, COLORS, MOTIONS)
    if motion != "spinning" or shape not in ROUND_SHAPES
]


def test_a_tenth_of_the_triples_is_held_out() -> None:
    share = sum(map(is_held_out_sprite, ALL_SPRITES)) / len(ALL_SPRITES)
    assert 0.08 <= share <= 0.12


def test_every_pair_of_properties_is_seen_in_training() -> None:
    def pairs(sprite: Sprite) -> set[tuple[str, str]]:
        return set(itertools.combinations((sprite.shape, sprite.color, sprite.motion), 2))

    possible = set().union(*map(pairs, ALL_SPRITES))
    seen = set().union(*(pairs(sprite) for sprite in ALL_SPRITES if not is_held_out_sprite(sprite)))
    assert seen == possible


def test_every_word_occurs_in_both_splits() -> None:
    for held_out in (False, True):
        sprites = [sprite for sprite in ALL_SPRITES if is_held_out_sprite(sprite) == held_out]
        assert {sprite.shape for sprite in sprites} == set(SHAPES)
        assert {sprite.color for sprite in sprites} == set(COLORS)
        assert {sprite.motion for sprite in sprites} == set(MOTIONS)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_sampled_scenes_belong_to_their_split(split: str) -> None:
    scenes = [sample_scene(seed, split=split) for seed in range(2000)]  # type: ignore[arg-type]
    assert all(is_held_out(scene) == (split == "heldout") for scene in scenes)
    assert scenes == [sample_scene(seed, split=split) for seed in range(2000)]  # type: ignore[arg-type]
    singles = sum(len(scene.sprites) == 1 for scene in scenes) / len(scenes)
    assert 0.6 < singles < 0.7


def test_sampled_scenes_use_every_motion_about_equally() -> None:
    motions = Counter(sprite.motion for seed in range(3000) for sprite in sample_scene(seed, split="train").sprites)
    assert set(motions) == set(MOTIONS)
    assert max(motions.values()) < 1.3 * min(motions.values())


def test_two_sprites_have_distinct_colors_and_bounce() -> None:
    for seed in range(500):
        first, second = sample_scene(seed, split="train", num_sprites=2).sprites
        assert first.color != second.color
        assert first.edge == second.edge == "bounce"


def test_single_sprites_wrap_and_bounce() -> None:
    scenes = [sample_scene(seed, split="train", num_sprites=1) for seed in range(1000)]
    travelling = [scene.sprites[0] for scene in scenes if scene.sprites[0].motion in TRAVELING]
    wraps = sum(sprite.edge == "wrap" for sprite in travelling) / len(travelling)
    assert 0.4 < wraps < 0.6
    assert all(scene.sprites[0].edge == "bounce" for scene in scenes if scene.sprites[0].motion not in TRAVELING)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_recolored_scene_differs_in_one_color(split: str) -> None:
    for seed in range(500):
        scene = sample_scene(seed, split=split)  # type: ignore[arg-type]
        other = recolor(scene)
        changed = [(a, b) for a, b in zip(scene.sprites, other.sprites, strict=True) if a != b]
        ((before, after),) = changed
        assert replace(before, color=after.color) == after
        assert (other.background, other.seed) == (scene.background, scene.seed)
        assert split == "heldout" or not is_held_out(other)
        assert recolor(scene) == other


def test_first_scenes_never_change() -> None:
    assert sample_scene(0, split="train") == Scene((Sprite("circle", "orange", "small", "up", "wrap"),), "black", 0)
    assert is_held_out_sprite(Sprite("circle", "red", "small", "still"))


def test_impossible_scenes_are_refused() -> None:
    red = Sprite("circle", "red", "small", "still")
    with pytest.raises(UserError, match="'crimson' is not a color; use one of red"):
        Sprite("circle", "crimson", "small", "still")
    with pytest.raises(UserError, match="spinning is not visible for a ring"):
        Sprite("ring", "red", "small", "spinning")
    with pytest.raises(UserError, match="use different colors"):
        Scene((red, red), "black", 0)
    with pytest.raises(UserError, match="has 0 sprites"):
        Scene((), "black", 0)
    with pytest.raises(UserError, match="own half"):
        Scene((red, Sprite("star", "blue", "small", "left", "wrap")), "black", 0)
