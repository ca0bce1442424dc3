"""Scripts: which values they refuse, and at which chunk boundaries their shots start."""

from __future__ import annotations

import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from longvideo.errors import UserError
from longvideo.infer.script import ChunkTiming, Script, ShotRequest, plan_chunks

TIMING = ChunkTiming(first=29, later=32, fps=24)


def test_timing_of_eight_latents_a_chunk() -> None:
    assert (TIMING.first, TIMING.later) == (29, 32)
    assert [TIMING.start(chunk) for chunk in range(4)] == [0, 29, 61, 93]


def test_prompts_share_the_length_equally() -> None:
    script = Script.from_prompts(["a", "b", "c"], seconds=12)
    assert [shot.seconds for shot in script.shots] == [4, 4, 4]
    assert all(shot.cut for shot in script.shots)


def test_plan_of_two_shots_in_twenty_seconds() -> None:
    plan = plan_chunks(Script.from_prompts(["a", "b"], seconds=20), TIMING)
    chunks = list(plan)
    assert plan.num_frames == sum(chunk.num_frames for chunk in chunks) == 480
    assert [chunk.num_frames for chunk in chunks] == [29, *[32] * 14, 3]
    # requested at frame 240; boundaries are at 221 and 253
    assert [chunk.index for chunk in chunks if chunk.cut] == [8]
    assert [chunk.shot for chunk in chunks] == [0] * 8 + [1] * 8


@pytest.mark.parametrize("seconds", [0.05, 1, 29 / 24, 30 / 24, 1.3, 7.77, 61 / 24, 62 / 24, 600])
def test_a_plan_has_exactly_the_requested_frames(seconds: float) -> None:
    plan = plan_chunks(Script.from_prompts("a", seconds=seconds), TIMING)
    chunks = list(plan)
    assert plan.num_frames == sum(chunk.num_frames for chunk in chunks) == round(seconds * 24)
    assert len(chunks) == plan.num_chunks and all(chunk.num_frames > 0 for chunk in chunks)


def test_every_shot_starts_within_half_a_chunk_of_its_requested_time() -> None:
    generator = random.Random(0)
    for _ in range(200):
        seconds = [generator.uniform(32 / 24 * 1.1, 9) for _ in range(generator.randint(2, 6))]
        plan = plan_chunks(Script(tuple(ShotRequest("a", s) for s in seconds)), TIMING)
        for shot, chunk in enumerate(plan.first_chunks):
            frame = sum(seconds[:shot]) * 24
            assert abs(TIMING.start(chunk) - frame) <= TIMING.later / 2 + 1
        assert len(set(plan.first_chunks)) == len(seconds)


def test_a_shot_without_a_cut_changes_the_shot_but_opens_no_scene() -> None:
    script = Script((ShotRequest("a", 4), ShotRequest("b", 4, cut=False), ShotRequest("c", 4)))
    chunks = list(plan_chunks(script, TIMING))
    starts = [next(chunk for chunk in chunks if chunk.shot == shot) for shot in range(3)]
    assert [chunk.cut for chunk in starts] == [False, False, True]
    assert sum(chunk.cut for chunk in chunks) == 1


def test_shots_shorter_than_a_chunk_are_refused_with_the_shot_named() -> None:
    with pytest.raises(UserError, match="shot 2 cannot start.*1.33 s or more"):
        plan_chunks(Script.from_prompts(["a", "b"], seconds=1), TIMING)
    with pytest.raises(UserError, match="shot 3 cannot start at 2.2 s"):
        plan_chunks(Script((ShotRequest("a", 2), *[ShotRequest("b", 0.2)] * 3, ShotRequest("c", 9))), TIMING)
    with pytest.raises(UserError, match="shorter than one frame"):
        plan_chunks(Script.from_prompts("a", seconds=0.01), TIMING)


def test_yaml_script_is_read(tmp_path: Path) -> None:
    path = tmp_path / "shots.yaml"
    path.write_text(
        "- prompt: a red ball bounces\n  seconds: 4\n- {prompt: 'at night', seconds: 2.5, cut: false}\n",
        encoding="utf-8",
    )
    script = Script.from_yaml(path)
    assert script.shots == (ShotRequest("a red ball bounces", 4.0), ShotRequest("at night", 2.5, cut=False))
    assert script.seconds == 6.5


def test_negative_prompts_of_a_script_are_for_shots_that_state_none(tmp_path: Path) -> None:
    path = tmp_path / "shots.yaml"
    shots = "- {prompt: a, seconds: 2}\n- {prompt: b, seconds: 2, negative_prompt: rain}\n"
    shots += "- {prompt: c, seconds: 2, negative_prompt: ''}\n"
    path.write_text(f"negative_prompt: fog\nshots:\n{shots}", encoding="utf-8")
    script = Script.from_yaml(path)
    assert script.negative_prompts == ("fog", "rain", "")
    assert script.texts == ("a", "b", "c", "fog", "rain", "")
    path.write_text(shots, encoding="utf-8")
    script = Script.from_yaml(path)
    assert script.negative_prompts == ("", "rain", "")
    assert Script.from_prompts(script, seconds=None, negative_prompt="fog").negative_prompts == ("fog", "rain", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "negative_prompt: 7\nshots:\n- {prompt: a, seconds: 3}",
            "shots.yaml: the negative prompt is 7; expected",
        ),
        ("negativ: a\nshots:\n- {prompt: a, seconds: 3}", "unknown key 'negativ'; did you mean 'negative_prompt'?"),
        ("shots:\n\n- {prompt: a, secnds: 3}", "shots.yaml:3: shot 1 has the unknown key 'secnds'"),
        (
            "- {prompt: a, seconds: 3, negative_prompt: 7}",
            "yaml:1: shot 1: the negative prompt is 7; expected text",
        ),
        ("- {prompt: a, secnds: 3}", "shots.yaml:1: shot 1 has the unknown key 'secnds'; did you mean 'seconds'?"),
        ("- {prompt: a, seconds: 3}\n- {promt: a, seconds: 3}", "shot 2 .*'promt'; did you mean 'prompt'?"),
        ("- {prompt: a, seconds: 3, fps: 3}", "unknown key 'fps'; the keys are prompt, seconds, cut"),
        ("- {seconds: 3}", "shot 1 has no prompt"),
        ("- {prompt: '  ', seconds: 3}", "shot 1: the prompt is empty"),
        ("- {prompt: 7, seconds: 3}", "shots.yaml:1: shot 1: the prompt is 7; expected text"),
        ("- {prompt: a}", "shot 1 has no seconds"),
        ("- {prompt: a, seconds: -3}", "shot 1: seconds is -3; expected a number above 0"),
        ("- {prompt: a, seconds: 0}", "shot 1: seconds is 0;"),
        ("- {prompt: a, seconds: 1e9}", "shot 1: seconds is 1e.09;"),
        ("- {prompt: a, seconds: .nan}", "shot 1: seconds is nan;"),
        ("- {prompt: a, seconds: long}", "shot 1: seconds is 'long'; expected a number"),
        ("- {prompt: a, seconds: yes}", "shot 1: seconds is True; expected a number"),
        ("- {prompt: a, seconds: 3, cut: 1}", "shot 1: cut is 1; expected true or false"),
        ("- a red ball", "shot 1 is 'a red ball'; expected a mapping"),
        ("prompt: a", "holds no list; expected a list of shots"),
        ("", "holds no list; expected a list of shots"),
        ("- [unclosed", "shots.yaml: not valid YAML in line"),
        (
            "- {prompt: a, seconds: 3}\n- {prompt: 'b', seconds: " + "9" * 5000 + "}",
            "in line 2: a number has 5,000 digits",
        ),
        ("- {prompt: a, seconds: " + "9" * 30 + "}", "seconds is 9{30}; expected a number"),
        (
            '- {prompt: a, seconds: 3}\n\n- {prompt: "a \\uD83D ball", seconds: 3}',
            "yaml: not valid YAML in line 3: found invalid Unicode",
        ),
        ("- {prompt: a, seconds: 3, [" + "x" * 500 + "]: 1}", "yaml: not valid YAML in line 1: .*unhashable"),
    ],
)
def test_bad_yaml_scripts_name_file_shot_and_remedy(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "shots.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        Script.from_yaml(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_script_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the script.*no such file"):
        Script.from_yaml(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="binary.yaml"):
        Script.from_yaml(tmp_path / "binary.yaml")


def test_a_byte_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "shots.yaml"
    path.write_bytes(b"- {prompt: a, seconds: 3}\n- {prompt: a r\xe9d ball, seconds: 3}\n")
    with pytest.raises(UserError, match=r"shots.yaml:2 is not UTF-8 text \(byte 0xe9\)"):
        Script.from_yaml(path)


def test_half_characters_are_refused_wherever_a_prompt_is_given() -> None:
    for text, half in (("a \ud83d ball", "half a character .U.D83D."), ("a r\udce9d ball", "the byte 0xe9")):
        with pytest.raises(UserError, match=f"prompt 2 is not valid text: {half} follows 'a"):
            Script.from_prompts(["a ball", text], seconds=4)
        with pytest.raises(UserError, match="the prompt of shot 1 is not valid text"):
            Script((ShotRequest(text, 3.0),))


@pytest.mark.parametrize(
    ("prompts", "seconds", "message"),
    [
        (7, 4, "prompts is 7; expected a text"),
        (["a", 7], 4, "prompt 2 is 7; expected text"),
        (b"a", 4, "prompt 1 is 97|the prompt is 97"),
        ("a", "4", "the video: seconds is '4'; expected a number"),
        ("a", True, "seconds is True; expected a number"),
        ("a", 10**400, "seconds is a number of [0-9]* bits; expected a number"),
    ],
)
def test_wrong_types_are_refused(prompts: Any, seconds: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Script.from_prompts(prompts, seconds=seconds)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e6, Fraction(10**400)])
def test_absurd_lengths_are_refused(seconds: float) -> None:
    with pytest.raises(UserError, match="expected a number above 0 and at most 86400"):
        Script.from_prompts("a", seconds=seconds)


@pytest.mark.parametrize("prompts", ["", "  ", [], ["a", ""]])
def test_empty_prompts_are_refused(prompts: str | list[str]) -> None:
    with pytest.raises(UserError, match="prompt"):
        Script.from_prompts(prompts, seconds=4)
