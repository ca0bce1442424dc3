"""Prompts that are all known are encoded before anything else is loaded, and their encoder is freed."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from longvideo.checkpoint.folder import ModelFolder
from longvideo.errors import UserError
from longvideo.infer.fit.placement import Placement
from longvideo.infer.loading import load_models
from longvideo.infer.pipeline import Script, ShotRequest, StreamingPipeline
from longvideo.infer.text_encoder import encode_prompts, load_text_encoder
from longvideo.quantization.number_formats import NumberFormats
from longvideo.text.encoder import TextEncoder
from longvideo.text.known_prompts import KnownPrompts

SCRIPT = Script(
    (ShotRequest("a red ball bounces", 1.0), ShotRequest("a blue square spins", 1.0, negative_prompt="a circle")),
    negative_prompt="a star",
)
PLACEMENT = Placement.choose("cpu", dtype=torch.float32)


def encoded() -> KnownPrompts:
    load = partial(load_text_encoder, ModelFolder.open("tiny"), PLACEMENT, NumberFormats())
    return encode_prompts(load, [SCRIPT], cut_prefix="", device=PLACEMENT.text_device)


def test_known_prompts_make_the_same_video(monkeypatch: pytest.MonkeyPatch) -> None:
    encoders: list[weakref.ref[TextEncoder]] = []
    load = ModelFolder.load_text_encoder

    def watched(self: ModelFolder, **options: Any) -> TextEncoder:
        encoder = load(self, **options)
        encoders.append(weakref.ref(encoder))
        return encoder

    pipeline = StreamingPipeline(load_models(ModelFolder.open("tiny"), PLACEMENT, decoder_name="wan"))
    monkeypatch.setattr(ModelFolder, "load_text_encoder", watched)
    known = encoded()
    gc.collect()
    assert [encoder() for encoder in encoders] == [None]
    other = StreamingPipeline(replace(pipeline.models, text_encoder=known))
    frames, expected = (
        np.concatenate(list(own.stream(SCRIPT, steps=2, guidance=2.0, seed=4))) for own in (other, pipeline)
    )
    assert np.array_equal(frames, expected)


def test_known_features_are_those_of_the_encoder_and_are_stored_without_zeros() -> None:
    encoder = load_text_encoder(ModelFolder.open("tiny"), PLACEMENT, NumberFormats())
    prompts = ["a red ball bounces", "", "a red ball bounces", "a " * 30]
    known = KnownPrompts(encoder, prompts, counted=["a cut. a red ball bounces"])
    for own, expected in zip(known.encode(prompts), encoder.encode(prompts), strict=True):
        assert torch.equal(own, expected)
    stored = sum(features.untyped_storage().nbytes() for features in known._features_SD.values())
    width, tokens = encoder.model.config.d_model, sum(map(encoder.num_tokens, dict.fromkeys(prompts)))
    assert stored == 4 * width * tokens
    assert known.num_tokens("a cut. a red ball bounces") == encoder.num_tokens("a cut. a red ball bounces")
    with pytest.raises(UserError, match="and 'a cut. a red ball bounces' is not one of them"):
        known.encode(["a cut. a red ball bounces"])


def test_a_shot_is_encoded_with_the_announcement_of_a_cut_only_where_it_may_have_one() -> None:
    load = partial(load_text_encoder, ModelFolder.open("tiny"), PLACEMENT, NumberFormats())
    shots = (ShotRequest("a ball", 1.0), ShotRequest("a cube", 1.0), ShotRequest("a star", 1.0, cut=False))
    scripts = [Script(shots), Script((ShotRequest("a square", 1.0, negative_prompt="rain"),))]
    known = encode_prompts(load, scripts, cut_prefix="cut. ", device=PLACEMENT.text_device)
    known.encode(["a ball", "a cube", "cut. a cube", "a star", "a square", "", "rain"])
    for prompt in ("cut. a ball", "cut. a star", "cut. a square"):
        assert known.num_tokens(prompt) > known.num_tokens(prompt.removeprefix("cut. "))
        with pytest.raises(UserError, match="is not one of them"):
            known.encode([prompt])


def test_another_prompt_is_refused() -> None:
    known = encoded()
    assert known.unknown_words("a  red ball bounces") == []
    with pytest.raises(UserError, match="freed after 4 prompts, and 'a green star' is not one of them; load the model"):
        known.encode(["a green star"])


@pytest.mark.gpu
def test_a_gpu_frees_the_encoder_before_the_transformer_is_loaded() -> None:
    placement = Placement.choose("cuda")
    folder = ModelFolder.open("tiny")
    known, own = (StreamingPipeline(load_models(folder, placement, scripts=scripts)) for scripts in ([SCRIPT], None))
    assert not isinstance(known.models.text_encoder, TextEncoder)
    frames, expected = (
        np.concatenate(list(pipeline.stream(SCRIPT, guidance=2.0, steps=2, seed=4))) for pipeline in (known, own)
    )
    assert np.array_equal(frames, expected)
