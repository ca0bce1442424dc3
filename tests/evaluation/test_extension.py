"""Continuations of footage are judged by what they show, and by the change at the seam."""

from __future__ import annotations

import numpy as np
import torch

from longvideo.evaluation.extension import (
    FOOTAGE_SECONDS,
    ExtensionResult,
    build_extensions,
    extensions_record,
    judge_extension,
    seam_ratios,
    summarize_extensions,
)
from longvideo.evaluation.shapeworld import FPS
from longvideo.pixels import to_uint8
from longvideo.shapeworld.batch import SceneBatch
from longvideo.shapeworld.render import render
from longvideo.shapeworld.world import Scene

TASKS = build_extensions(6)


def rendered(scene: Scene, seconds: float) -> np.ndarray:
    times = torch.arange(round(seconds * FPS), dtype=torch.float64)[None] / FPS
    return to_uint8(render(SceneBatch.from_scenes([scene]), times))[0].numpy()


def judged(number: int, frames: np.ndarray, *, level: int = 0) -> ExtensionResult:
    """Judge a continuation. level: brightness of the file minus that of the decoded footage."""
    last = TASKS[number].footage()[-1].numpy()
    return judge_extension(TASKS[number], last + np.uint8(level), last, frames)


def test_the_scene_itself_continues_its_footage() -> None:
    results = []
    for number, task in enumerate(TASKS):
        whole = rendered(task.scene, 2 * FOOTAGE_SECONDS)
        footage = task.footage().numpy()
        assert np.array_equal(whole[: len(footage)], footage)
        results.append(judged(number, whole[len(footage) :], level=1))
    scores = summarize_extensions(results)
    assert [scores[name].share for name in ("color", "shape", "motion")] == [1, 1, 1]
    ratios = seam_ratios(results)
    assert 0.8 < ratios["seam"] < 1.2 < ratios["seam_from_the_file"]
    assert extensions_record(results)["scores"]["color"]["right"] == len(TASKS)


def test_another_scene_is_a_jump_and_wrong() -> None:
    results = [judged(number, rendered(TASKS[number - 1].scene, 4)) for number in range(len(TASKS))]
    scores = summarize_extensions(results)
    assert scores["color"].share < 0.5 and scores["motion"].share < 0.8
    assert seam_ratios(results)["seam"] > 5


def test_other_seeds_have_other_scenes() -> None:
    assert {task.prompt for task in build_extensions(6, seed=1)}.isdisjoint(task.prompt for task in TASKS)
