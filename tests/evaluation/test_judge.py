"""The judge recognizes the content of rendered scenes, clean or degraded, and gives the right verdicts."""

import dataclasses

import numpy as np
import pytest
import torch

from longvideo.errors import UserError
from longvideo.evaluation.accuracy import CONDITIONS, measure_judge, to_frames
from longvideo.evaluation.judge import PerceivedSprite, Percept, compare, judge, perceive
from longvideo.evaluation.request import Request, RequestedSprite
from longvideo.shapeworld.batch import SceneBatch
from longvideo.shapeworld.render import render
from longvideo.shapeworld.world import BACKGROUNDS, COLORS, MOTIONS, SHAPES, Scene, Sprite

FPS = 8  # rate at which the judge samples a clip of 24 frames per second


def film(scene: Scene, *, seconds: float = 4.0, start: float = 0.0, condition: str = "clean") -> np.ndarray:
    times = start + torch.arange(round(seconds * FPS)) / FPS
    video = (render(SceneBatch.from_scenes([scene]), times[None])[0].transpose(0, 1) + 1) * 127.5
    return to_frames(CONDITIONS[condition](video, torch.Generator().manual_seed(scene.seed)))


def see(sprite: Sprite, *, seed: int = 0, seconds: float = 4.0, condition: str = "clean") -> PerceivedSprite:
    percept = perceive(film(Scene((sprite,), "gray", seed), seconds=seconds, condition=condition), FPS)
    assert len(percept.sprites) == 1
    return percept.sprites[0]


def test_accuracy_on_random_scenes_is_above_the_bar_in_every_condition() -> None:
    for accuracy in measure_judge(5, seed=3):
        for question in ("count", "color", "shape", "size", "motion", "background", "both"):
            score = accuracy.scores[question]
            assert score.right == score.total, (accuracy.condition, question, accuracy.confusions)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_every_color_is_named_on_every_background(background: str) -> None:
    for index, color in enumerate(COLORS):
        scene = Scene((Sprite(SHAPES[index % len(SHAPES)], color, "small", "still"),), background, index)
        percept = perceive(film(scene, seconds=0.25, condition="compressed"), FPS)
        assert [sprite.color for sprite in percept.sprites] == [color]
        assert percept.background == background


@pytest.mark.parametrize("condition", ["clean", "compressed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_small_shapes_are_distinguished(shape: str, condition: str) -> None:
    seen = see(Sprite(shape, "pink", "small", "still"), seconds=0.5, condition=condition)
    assert (seen.shape, seen.size) == (shape, "small")
    assert abs(seen.radius - 11) < 0.8


@pytest.mark.parametrize("motion", MOTIONS)
def test_every_motion_is_named(motion: str) -> None:
    assert see(Sprite("square", "cyan", "large", motion), condition="soft").motion == motion


@pytest.mark.parametrize("shape", ["square", "triangle", "star", "cross"])
def test_spinning_is_distinguished_from_still_without_a_wrong_shape(shape: str) -> None:
    seen = see(Sprite(shape, "yellow", "small", "spinning"), seconds=3, condition="soft")
    assert (seen.shape, seen.motion) == (shape, "spinning")
    assert see(Sprite(shape, "yellow", "small", "still"), seconds=2, condition="soft").motion == "still"


def test_pulsing_does_not_change_the_size() -> None:
    for size, radius in (("small", 11.0), ("large", 20.0)):
        seen = see(Sprite("ring", "green", size, "pulsing"), seed=4)
        assert (seen.size, seen.motion) == (size, "pulsing")
        assert abs(seen.radius - radius) < 0.15 * radius


def test_a_bounce_does_not_change_the_direction_first_shown() -> None:
    for seed in range(3):
        assert see(Sprite("circle", "red", "small", "left", "bounce"), seed=seed, seconds=3).motion == "left"


def test_an_object_split_by_two_borders_is_one_object() -> None:
    sprite = Sprite("square", "orange", "large", "right", "wrap")
    scene = Scene((sprite,), "night", 1)
    torn = 0
    for frame in range(8, 20):
        frames = film(scene, seconds=0.125, start=frame / FPS)
        percept = perceive(frames, FPS)
        assert percept.count == 1
        assert [(s.shape, s.color) for s in percept.sprites] == [("square", "orange")]
        torn += bool((frames[0, :, [0, -1], 0] > 150).any(1).all())
    assert torn >= 3
    assert see(sprite, seed=1).motion == "right"


def test_later_windows_allow_a_bounced_direction_only_for_bouncing_objects() -> None:
    expected = Sprite("star", "blue", "small", "up", "bounce")
    seen = PerceivedSprite("star", "blue", "small", "down", 11.0, 50.0, 50.0, 0.9)
    percept = Percept((seen,), "gray", 1)
    for edge, from_start, right in (("bounce", True, False), ("bounce", False, True), ("wrap", False, False)):
        scene = Scene((dataclasses.replace(expected, edge=edge),), "gray", 0)
        assert compare(percept, scene, from_start=from_start).motion is right


def test_each_wrong_property_makes_its_own_answer_false() -> None:
    shown = Sprite("star", "blue", "small", "still")
    frames = film(Scene((shown,), "cream", 5), seconds=1)
    right = judge(frames, Scene((shown,), "cream", 5), FPS)
    assert right.color and right.shape and right.size and right.motion and right.background and right.count
    assert right.both is None
    for field, other in (("shape", "cross"), ("color", "purple"), ("size", "large"), ("motion", "spinning")):
        verdict = judge(frames, Scene((dataclasses.replace(shown, **{field: other}),), "cream", 5), FPS)
        answers = {name: getattr(verdict, name) for name in ("shape", "color", "size", "motion")}
        assert answers == {name: name != field for name in answers}
    assert not judge(frames, Scene((shown,), "gray", 5), FPS).background


def test_both_objects_must_be_right_and_order_does_not_matter() -> None:
    red, blue = Sprite("circle", "red", "large", "still"), Sprite("cross", "blue", "small", "pulsing")
    frames = film(Scene((red, blue), "meadow", 2))
    assert judge(frames, Scene((blue, red), "meadow", 2), FPS).both is True
    swapped = (dataclasses.replace(red, color="blue"), dataclasses.replace(blue, color="red"))
    verdict = judge(frames, Scene(swapped, "meadow", 2), FPS)
    assert verdict.both is False and not verdict.shape
    alone = judge(film(Scene((red,), "meadow", 2), seconds=0.5), Scene((red, blue), "meadow", 2), FPS)
    assert alone.both is False and not alone.count and not alone.color
    assert [seen is None for _, seen in alone.pairs] == [False, True]


def test_what_a_request_leaves_open_counts_as_right() -> None:
    frames = film(Scene((Sprite("ring", "purple", "large", "still"),), "black", 0), seconds=0.5)
    verdict = judge(frames, Request((RequestedSprite("ring", "purple", None, None),), None), FPS)
    assert verdict.color and verdict.shape and verdict.size and verdict.motion and verdict.background


def test_an_empty_picture_and_pure_noise_show_no_known_object() -> None:
    gray = np.full((6, 128, 224, 3), 124, np.uint8)
    assert perceive(gray).sprites == () and perceive(gray).count == 0
    noise = np.random.default_rng(0).integers(0, 256, (6, 128, 224, 3), dtype=np.uint8)
    scene = Scene((Sprite("star", "red", "small", "left"),), "gray", 0)
    assert not judge(noise, scene).shape


def test_frames_of_the_wrong_kind_are_a_user_error() -> None:
    with pytest.raises(UserError, match="uint8"):
        perceive(np.zeros((4, 128, 224, 3), np.float32))
