"""Captions are correct, short and varied, and use a closed list of words."""

import re

from longvideo.shapeworld.captions import SHAPE_WORDS, SIZE_WORDS, caption, vocabulary
from longvideo.shapeworld.world import COLORS, TRAVELING, Scene, Sprite, sample_scene

SCENES = [sample_scene(seed, split=split) for split in ("train", "heldout") for seed in range(4000)]
CAPTIONS = [caption(scene, seed) for seed, scene in enumerate(SCENES)]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text)


def test_captions_use_only_the_vocabulary_and_all_of_it() -> None:
    used = {word for text in CAPTIONS for word in words(text)}
    assert used == set(vocabulary())


def test_captions_are_plain_lower_case_words_commas_and_periods() -> None:
    for text in CAPTIONS:
        assert re.fullmatch(r"[a-z]+(?:[,.]? [a-z]+)*\.?", text), text


def test_captions_have_fewer_than_40_words() -> None:
    assert max(len(words(text)) for text in CAPTIONS) < 40


def test_captions_name_color_shape_and_size() -> None:
    for scene, text in zip(SCENES, CAPTIONS, strict=True):
        for sprite in scene.sprites:
            sizes = "|".join(SIZE_WORDS[sprite.size])
            shapes = "|".join(SHAPE_WORDS[sprite.shape])
            assert re.search(rf"\ban? ({sizes}) {sprite.color} ({shapes})\b", text), text
        for color in set(COLORS) - {sprite.color for sprite in scene.sprites}:
            assert color not in words(text)


def test_a_bounce_is_always_said_and_a_wrap_sometimes() -> None:
    wraps = []
    for scene, text in zip(SCENES, CAPTIONS, strict=True):
        edges = {sprite.edge for sprite in scene.sprites if sprite.motion in TRAVELING}
        assert ("bounc" in text) == ("bounce" in edges), text
        if "wrap" in edges:
            wraps.append(re.search("wrap|other side|opposite side", text) is not None)
    assert 0.5 < sum(wraps) / len(wraps) < 0.9


def test_captions_vary_and_repeat_with_their_seed() -> None:
    scene = Scene((Sprite("circle", "red", "small", "left", "wrap"),), "black", 0)
    many = [caption(scene, seed) for seed in range(3000)]
    assert len(set(many)) > 1500
    assert many == [caption(scene, seed) for seed in range(3000)]
    typical = re.compile("a small red circle [a-z]+ left (over|on|against) a black background")
    assert sum(typical.match(text) is not None for text in many) >= 10


def test_size_and_background_can_be_left_out() -> None:
    scene = Scene((Sprite("circle", "orange", "small", "left"),), "black", 0)
    short = [caption(scene, seed, omit=1.0) for seed in range(500)]
    assert not any({"small", "tiny", "little", "background"} & set(words(text)) for text in short)
    assert all("an orange " in text and "bounc" in text for text in short)
    assert set(words(" ".join(short))) <= set(vocabulary())
