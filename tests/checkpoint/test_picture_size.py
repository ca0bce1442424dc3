"""Picture sizes other than the model's: how they are written, which are possible, and that videos have them."""

from __future__ import annotations

import numpy as np
import pytest

from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.picture_size import PictureSize
from longvideo.errors import UserError
from longvideo.infer.pipeline import StreamingPipeline

WAN = PictureSize(1280, 704)


def test_a_size_is_width_then_height() -> None:
    assert PictureSize.parse("1280x704") == PictureSize.parse("1280X704") == WAN == PictureSize(width=1280, height=704)
    assert str(WAN) == "1280x704"


@pytest.mark.parametrize(
    "text", ["", "1280", "x704", "1280x", "0x704", "-32x64", "1280x704x3", "1e3x704", "9" * 30 + "x1"]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected WIDTHxHEIGHT in pixels, such as 1280x704"):
        PictureSize.parse(text)


@pytest.mark.parametrize("text", ["1280x704", "704x1280", "832x480", "32x32", "928x928"])
def test_sizes_with_at_most_the_models_tokens_are_possible(text: str) -> None:
    PictureSize.parse(text).check(WAN, 32)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1280x720", "size is 1280x720; expected multiples of 32, such as 1248x704"),
        (
            "1920x1088",
            r"2040 tokens for each latent frame; the model was trained with 880, 1280x704; use .* such as 1248x704",
        ),
        ("30016x32", "938 tokens for each latent frame"),
        ("16x16", "multiples of 32, such as 32x32"),
    ],
)
def test_impossible_sizes_name_a_possible_one(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        PictureSize.parse(text).check(WAN, 32)
    PictureSize.parse(str(error.value).rpartition(" ")[2]).check(WAN, 32)


def test_a_video_has_the_size_and_a_warning_names_the_models_own() -> None:
    with pytest.warns(UserWarning, match="trained for 224x128; videos of 160x96 may look worse"):
        pipeline = StreamingPipeline.from_pretrained("tiny", device="cpu", decoder="wan", size="160x96")
    frames = np.concatenate(list(pipeline.stream("a red ball bounces", seconds=0.5, steps=1)))
    assert frames.shape == (12, 96, 160, 3)
    own = ModelFolder.open("tiny")
    assert own.resized(PictureSize(224, 128)) is own
