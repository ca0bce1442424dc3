"""Parsing a caption gives the scene that it describes."""

import pytest

from longvideo.errors import UserError
from longvideo.evaluation.request import Request, RequestedSprite, read_caption
from longvideo.shapeworld.captions import caption
from longvideo.shapeworld.world import TRAVELING, Scene, sample_scene


def summary(scene: Scene | Request, *, sizes: bool = True) -> tuple:
    sprites = {
        (s.shape, s.color, s.size if sizes else None, s.motion, s.edge if s.motion in TRAVELING else None)
        for s in scene.sprites
    }
    return sprites, scene.background


def test_five_hundred_captions_are_read_back_exactly() -> None:
    for seed in range(500):
        scene = sample_scene(seed, split="heldout" if seed % 2 else "train")
        assert summary(read_caption(caption(scene, seed))) == summary(scene), caption(scene, seed)


def test_what_a_caption_leaves_out_is_none() -> None:
    for seed in range(200):
        scene = sample_scene(seed, split="train")
        request = read_caption(caption(scene, seed, omit=1.0))
        assert request.background is None
        assert all(sprite.size is None for sprite in request.sprites)
        assert summary(request)[0] == summary(scene, sizes=False)[0]


def test_free_wording_is_understood_as_far_as_it_goes() -> None:
    assert read_caption("A red ball, the best ever") == Request(
        (RequestedSprite("circle", "red", None, None, "wrap"),), None
    )


def test_a_caption_without_shapes_is_a_user_error() -> None:
    with pytest.raises(UserError, match="has 0 colored shapes"):
        read_caption("a horse gallops over a meadow")
