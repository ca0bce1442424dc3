"""The pictures of a model's page have held-out prompts, keep the colors of small areas, and are small files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from longvideo.cli.main import main
from longvideo.evaluation.request import read_caption
from longvideo.evaluation.showcase import PROMPTS, wrap_text, write_showcase
from longvideo.pixels import to_uint8
from longvideo.shapeworld.batch import SceneBatch
from longvideo.shapeworld.captions import vocabulary
from longvideo.shapeworld.render import render
from longvideo.shapeworld.world import BACKGROUNDS, Scene, Sprite, is_held_out


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [_scene(prompt, index) for index, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def clips(scenes: list[Scene]) -> list[np.ndarray]:
    times = torch.arange(24)[None] / 8
    return [to_uint8(render(SceneBatch.from_scenes([scene]), times))[0].numpy() for scene in scenes]


def test_every_prompt_is_held_out_and_made_of_known_words(scenes: list[Scene]) -> None:
    assert all(is_held_out(scene) for scene in scenes)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    known = set(vocabulary())
    assert [word for prompt in PROMPTS for word in prompt.replace(",", "").split() if word not in known] == []


def test_the_pictures_hold_every_clip_and_are_small(clips: list[np.ndarray], tmp_path: Path) -> None:
    write_showcase(clips, PROMPTS, (tmp_path / "model.png", tmp_path / "model.gif"), fps=8)
    assert (tmp_path / "model.png").stat().st_size < 40_000
    assert (tmp_path / "model.gif").stat().st_size < 140_000
    with Image.open(tmp_path / "model.gif") as gif:
        assert gif.size[0] == 6 + 3 * (224 + 6)
        frame = np.asarray(gif.convert("RGB"))
    for column, clip in enumerate(clips[:3]):
        left = 6 + column * 230
        assert np.abs(frame[6 : 6 + 128, left : left + 224].astype(int) - clip[0]).mean() < 4


def test_text_breaks_between_words_and_loses_none() -> None:
    font = ImageFont.load_default(size=12)
    lines = wrap_text(PROMPTS[-1], font, 224)
    assert 1 < len(lines) <= 3
    assert " ".join(lines) == PROMPTS[-1]
    assert all(font.getlength(line) <= 224 for line in lines)


def test_existing_pictures_are_refused_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.gif").write_bytes(b"old")
    assert main(["eval", "sheet", "--out", str(tmp_path)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "tiny.gif").read_bytes() == b"old"


def _scene(prompt: str, seed: int) -> Scene:
    request = read_caption(prompt)
    assert request.background is not None
    sprites = [Sprite(s.shape, s.color, s.size or "small", s.motion or "still") for s in request.sprites]
    return Scene(tuple(sprites), request.background, seed)
