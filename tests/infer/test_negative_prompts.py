"""Negative prompts, and the length of prompts: what changes a video, what keeps it, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from longvideo.errors import UserError
from longvideo.infer.pipeline import Script, ShotRequest, StreamingPipeline
from longvideo.infer.script import PromptError
from tests.golden import relative_error

PROMPT, OTHER, NEGATIVE = "a red ball bounces", "a blue square spins", "a ball at night"
CHUNK = 32
"""Frames of every chunk but the first one, which has three fewer."""
FIRST = CHUNK - 3
GUIDED: dict[str, Any] = {"guidance": 3.0, "seed": 4}


def video(pipeline: StreamingPipeline, prompts: str | list[str] | Script, **options: Any) -> np.ndarray:
    return np.concatenate(list(pipeline.stream(prompts, **options)))


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - other).mean())


def test_an_empty_negative_prompt_changes_no_bit(pipeline: StreamingPipeline) -> None:
    plain = video(pipeline, PROMPT, seconds=2, **GUIDED)
    assert np.array_equal(video(pipeline, PROMPT, seconds=2, negative_prompt="", **GUIDED), plain)
    assert difference(video(pipeline, PROMPT, seconds=2, negative_prompt=NEGATIVE, **GUIDED), plain) > 1


def test_guidance_away_from_the_prompt_itself_is_no_guidance(pipeline: StreamingPipeline) -> None:
    plain = video(pipeline, PROMPT, seconds=2, seed=4)
    same = video(pipeline, PROMPT, seconds=2, negative_prompt=PROMPT, **GUIDED)
    assert np.abs(same.astype(int) - plain).max() <= 1
    assert difference(video(pipeline, PROMPT, seconds=2, **GUIDED), plain) > 1


def test_a_batch_is_guided_away_from_the_same_text(pipeline: StreamingPipeline) -> None:
    options: dict[str, Any] = {"guidance": 3.0, "negative_prompt": NEGATIVE}
    batch = pipeline.generate_batch([[PROMPT], [OTHER]], seconds=[2], seeds=[4, 5], **options)
    for frames, prompt, seed in zip(batch, (PROMPT, OTHER), (4, 5), strict=True):
        assert np.abs(frames.astype(int) - video(pipeline, prompt, seconds=2, seed=seed, **options)).max() <= 1
    plain = pipeline.generate_batch([[PROMPT], [OTHER]], seconds=[2], seeds=[4, 5], guidance=3.0)
    assert difference(batch, plain) > 1
    with pytest.raises(UserError, match="guidance"):
        pipeline.generate_batch([[PROMPT]], seconds=[2], seeds=[4], guidance=1.0, negative_prompt=NEGATIVE)


def test_a_negative_prompt_changes_with_its_shot(pipeline: StreamingPipeline) -> None:
    seconds = (FIRST + CHUNK) / 24, CHUNK / 24
    shots = [ShotRequest(PROMPT, length, cut=False) for length in seconds]
    own = ShotRequest(PROMPT, seconds[1], cut=False, negative_prompt=NEGATIVE)
    plain, later = (video(pipeline, Script((shots[0], second)), **GUIDED) for second in (shots[1], own))
    assert np.array_equal(later[: FIRST + CHUNK], plain[: FIRST + CHUNK])
    assert difference(later[FIRST + CHUNK :], plain[FIRST + CHUNK :]) > 1
    # the text of the script is for shots that state none
    none = ShotRequest(PROMPT, seconds[0], cut=False, negative_prompt="")
    assert np.array_equal(video(pipeline, Script((none, shots[1]), NEGATIVE), **GUIDED), later)
    assert np.array_equal(video(pipeline, Script((none, shots[1])), negative_prompt=NEGATIVE, **GUIDED), later)


def test_a_session_keeps_its_negative_prompt_until_another_one_is_given(pipeline: StreamingPipeline) -> None:
    with pipeline.session(PROMPT, seconds=(FIRST + 3 * CHUNK) / 24, negative_prompt=NEGATIVE, **GUIDED) as session:
        session.add_shot(OTHER, chunk=1, mode="keep")
        session.add_shot(PROMPT, chunk=2, mode="keep", negative_prompt="")
        session.add_shot(OTHER, chunk=3, mode="keep")
        parts = list(session)
    steps = [part.step for part in parts if part.is_complete]
    assert [step.negative_prompts for step in steps] == [(NEGATIVE,), (NEGATIVE,), ("",), ("",)]
    first = ShotRequest(PROMPT, FIRST / 24, negative_prompt=NEGATIVE)
    second = ShotRequest(OTHER, CHUNK / 24, cut=False, negative_prompt=NEGATIVE)
    rest = (ShotRequest(PROMPT, CHUNK / 24, cut=False), ShotRequest(OTHER, CHUNK / 24, cut=False))
    expected = video(pipeline, Script((first, second, *rest)), **GUIDED)
    assert np.array_equal(np.concatenate([part.frames[0] for part in parts]), expected)


def test_seek_keeps_or_replaces_the_negative_prompt_of_the_chunk(pipeline: StreamingPipeline) -> None:
    with pipeline.session(PROMPT, seconds=(FIRST + 2 * CHUNK) / 24, **GUIDED) as session:
        session.add_shot(OTHER, chunk=1, mode="keep", negative_prompt=NEGATIVE)
        while session.next_chunk < 2:
            next(session)
        session.seek(1, prompt=PROMPT, mode="keep")
        assert session.shots[1].negative_prompt == NEGATIVE
        session.seek(0, prompt=PROMPT, mode="keep", negative_prompt="a square")
        assert session.shots[0].negative_prompt == "a square"
        with pytest.raises(PromptError, match="a negative prompt without a prompt; give both"):
            session.seek(0, negative_prompt=NEGATIVE)


@pytest.mark.parametrize("mode", ["keep", "recache"])
def test_a_snapshot_continues_with_both_prompts(mode: Any, pipeline: StreamingPipeline, tmp_path: Path) -> None:
    path = tmp_path / "session.safetensors"
    with pipeline.session(PROMPT, negative_prompt="a square", **GUIDED) as session:
        session.add_shot(OTHER, chunk=1, mode=mode, negative_prompt=NEGATIVE)
        while session.next_chunk < 2:  # no chunk has left the window
            next(session)
        session.snapshot(path)
        expected = next(session).record.latents
    with pipeline.restore(path) as restored:
        chunk = next(restored)
    assert chunk.step.negative_prompts == (NEGATIVE,)
    assert relative_error(chunk.record.latents, expected) < 1e-3
    # one without negative prompts, as earlier versions wrote them, had none
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    fields = json.loads(metadata["session"])
    fields["shots"] = [shot[:3] for shot in fields["shots"]]
    for step in fields["steps"]:
        del step["negative_prompts"]
    save_file(load_file(path), path, metadata={**metadata, "session": json.dumps(fields)})
    with pipeline.restore(path) as restored:
        assert {shot.negative_prompt for shot in restored.shots.values()} == {""}
        other = next(restored)
    assert other.step.negative_prompts == ("",) and relative_error(other.record.latents, expected) > 0.05


def session_calls(call: Callable[[Any], object]) -> Callable[[StreamingPipeline], object]:
    def act(pipeline: StreamingPipeline) -> None:
        with pipeline.session(PROMPT) as session:
            call(session)

    return act


UNGUIDED: dict[str, Callable[[StreamingPipeline], object]] = {
    "a prompt": lambda pipe: pipe.stream(PROMPT, seconds=1, negative_prompt=NEGATIVE),
    "guidance 1": lambda pipe: pipe.stream_chunks(PROMPT, seconds=1, negative_prompt=NEGATIVE, guidance=1),
    "a script": lambda pipe: pipe.stream(Script((ShotRequest(PROMPT, 1.0),), NEGATIVE)),
    "a shot": lambda pipe: pipe.stream(Script((ShotRequest(PROMPT, 1.0, negative_prompt=NEGATIVE),))),
    "a session": lambda pipe: pipe.session(PROMPT, negative_prompt=NEGATIVE),
    "a switch": session_calls(lambda session: session.set_prompt(OTHER, negative_prompt=NEGATIVE)),
    "a planned shot": session_calls(lambda session: session.add_shot(OTHER, chunk=3, negative_prompt=NEGATIVE)),
    "a seek": session_calls(lambda session: session.seek(0, prompt=OTHER, negative_prompt=NEGATIVE)),
}


@pytest.mark.parametrize("name", UNGUIDED)
def test_without_guidance_it_is_refused_with_what_to_set(name: str, pipeline: StreamingPipeline) -> None:
    message = r"guidance is 1; set guidance above 1 \(this model runs without it\)"
    with pytest.raises(PromptError, match=message) as caught:
        UNGUIDED[name](pipeline)
    assert "\n" not in str(caught.value)


def test_a_model_with_guidance_names_its_own() -> None:
    teacher = StreamingPipeline.from_pretrained("tiny-teacher", device="cpu")
    own = teacher.models.settings.guidance
    with pytest.raises(PromptError, match=rf"set guidance above 1 \(the model's own is {own:g}\)"):
        teacher.stream("a red circle", seconds=1, negative_prompt="a square", guidance=1)
    frames = video(teacher, "a red circle", seconds=0.5, negative_prompt="a square", steps=2)
    assert difference(frames, video(teacher, "a red circle", seconds=0.5, steps=2)) > 0.1


TOO_LONG: dict[str, tuple[Callable[[StreamingPipeline], object], str]] = {
    "a prompt": (lambda pipe: pipe.stream("ball " * 32, seconds=1), "the prompt has 33 tokens; expected at most 32"),
    "a shot": (
        lambda pipe: pipe.stream([PROMPT, "ball " * 40], seconds=4),
        "the prompt of shot 2 has 41 tokens; expected at most 32; shorten 'ball ball",
    ),
    "a negative prompt": (
        lambda pipe: pipe.stream(PROMPT, seconds=1, negative_prompt="night " * 50, guidance=2),
        "the negative prompt has 51 tokens",
    ),
    "a session": (lambda pipe: pipe.session("ball " * 32), "the prompt has 33 tokens"),
    "a switch": (session_calls(lambda session: session.set_prompt("ball " * 32)), "the prompt has 33 tokens"),
    "a batch": (lambda pipe: pipe.generate_batch([["ball " * 32]], seconds=[1], seeds=[1]), "the prompt has 33 tokens"),
}


@pytest.mark.parametrize("name", TOO_LONG)
def test_a_prompt_of_more_tokens_than_the_model_reads_is_refused(name: str, pipeline: StreamingPipeline) -> None:
    call, message = TOO_LONG[name]
    with pytest.raises(PromptError, match=message):
        call(pipeline)
    assert len(next(pipeline.stream("ball " * 31, seconds=1))) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: pipe.stream(PROMPT, seconds=1, negative_prompt=7), "the negative prompt is 7; expected text"),
        (lambda pipe: pipe.session(PROMPT, negative_prompt="a \ud83d"), "the negative prompt is not valid text"),
        (
            lambda pipe: pipe.stream(Script((ShotRequest(PROMPT, 1.0),), NEGATIVE), negative_prompt="a square"),
            "the script has the negative prompt 'a ball at night'; leave the other one, 'a square', out",
        ),
    ],
)
def test_wrong_negative_prompts_are_refused(
    call: Callable[[StreamingPipeline], object], message: str, pipeline: StreamingPipeline
) -> None:
    with pytest.raises(UserError, match=message):
        call(pipeline)
