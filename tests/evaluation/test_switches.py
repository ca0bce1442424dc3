"""The judge of prompt switches gives the right results on rendered scenes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from longvideo.evaluation.switches import SwitchTask, build_switches, judge_switch, summarize_switches
from longvideo.pixels import to_uint8
from longvideo.shapeworld.batch import SceneBatch
from longvideo.shapeworld.render import render
from longvideo.shapeworld.world import Scene, Sprite

FPS, FRAMES = 24, 32
RED = Scene((Sprite("square", "red", "large", "right"),), "black", seed=3)
BLUE = replace(RED, sprites=(replace(RED.sprites[0], color="blue"),))
TASK = SwitchTask((RED, BLUE), ("a red square", "a blue square"), seed=0)


def clip(scene: Scene, chunk: int) -> np.ndarray:
    times = (torch.arange(FRAMES) + chunk * FRAMES) / FPS
    return to_uint8(render(SceneBatch.from_scenes([scene]), times[None]))[0].numpy()


def test_a_switch_at_once_in_the_same_place() -> None:
    result = judge_switch(TASK, clip(RED, 0), [clip(BLUE, 1), clip(BLUE, 2)], first_late=1)
    assert result.shown == (True, True) and result.continues and result.late == 1


def test_a_switch_that_comes_a_chunk_later() -> None:
    result = judge_switch(TASK, clip(RED, 0), [clip(RED, 1), clip(BLUE, 2)], first_late=2)
    assert result.shown == (False, True) and result.continues and result.late == 3


def test_a_prompt_that_is_never_shown() -> None:
    result = judge_switch(TASK, clip(RED, 0), [clip(RED, 1), clip(RED, 2)], first_late=1)
    assert result.shown == (False, False) and result.late is None


@pytest.mark.parametrize(
    "after",
    [
        replace(BLUE, background="meadow"),
        replace(BLUE, seed=7),
        replace(BLUE, sprites=(Sprite("circle", "blue", "large", "right"),)),
    ],
)
def test_another_place_shape_or_background_is_another_scene(after: Scene) -> None:
    assert not judge_switch(TASK, clip(RED, 0), [clip(after, 1)], first_late=1).continues


def test_a_frame_that_blends_both_colors_at_the_switch_loses_no_scene() -> None:
    after = clip(BLUE, 1).copy()
    after[0] = clip(RED, 1)[0]
    result = judge_switch(TASK, clip(RED, 0), [after], first_late=1)
    assert result.continues and result.shown == (True,) and result.number


def test_39_of_40_rendered_scenes_continue_after_a_change_of_color() -> None:
    """The remaining error is at the edge, where places before and after are a frame's width apart."""
    results = []
    for task in build_switches(40, change="color"):
        before, after = task.scenes
        results.append(judge_switch(task, clip(before, 3), [clip(after, 4)], first_late=1))
    assert sum(result.continues for result in results) >= 39
    assert all(result.late == 1 and result.number for result in results)


def test_results_add_up() -> None:
    results = [
        judge_switch(TASK, clip(RED, 0), [clip(first, 1), clip(BLUE, 2)], first_late=1) for first in (RED, BLUE, BLUE)
    ]
    scores = summarize_switches(results)
    assert [(score.right, score.total) for score in scores.values()] == [(2, 3), (3, 3), (3, 3), (3, 3)]
    assert list(scores) == ["chunk 1", "chunk 2", "number", "continues"]


def test_color_tasks_change_nothing_else() -> None:
    for task in build_switches(12, change="color"):
        (before,), (after,) = (scene.sprites for scene in task.scenes)
        assert replace(before, color=after.color) == after and before.color != after.color
        assert task.scenes[0].background == task.scenes[1].background
        changed = [a for a, b in zip(*(prompt.split() for prompt in task.prompts), strict=True) if a != b]
        assert len(changed) == 1
