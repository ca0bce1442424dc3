"""Perfect videos score 100 %, and wrong ones fail in the property that is wrong."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from longvideo.evaluation.judge import ExpectedScene
from longvideo.evaluation.shapeworld import (
    FPS,
    Score,
    Task,
    build_tasks,
    evaluate,
    find_cut,
    judge_video,
    wilson_interval,
)
from longvideo.pixels import to_uint8
from longvideo.shapeworld.batch import SceneBatch
from longvideo.shapeworld.render import render
from longvideo.shapeworld.world import Scene, Sprite, is_held_out


def drawn(scene: ExpectedScene) -> Scene:
    """Return the scene of a task, which is complete if `build_tasks` has built it."""
    assert isinstance(scene, Scene)
    return scene


def film(task: Task, *, delay: int = 0) -> np.ndarray:
    """Render the video of a task, with every cut `delay` frames later than expected."""
    ends = [start + delay for start in task.starts[1:]] + [round(sum(task.seconds) * FPS)]
    starts = [0, *ends[:-1]]
    shots = []
    for scene, start, end in zip(task.scenes, starts, ends, strict=True):
        times = torch.arange(end - start) / FPS
        shots.append(to_uint8(render(SceneBatch.from_scenes([drawn(scene)]), times[None]))[0].numpy())
    return np.concatenate(shots)


def test_tasks_are_held_out_distinct_and_reproducible() -> None:
    tasks = build_tasks(20, seconds=4, shots=3, seed=1)
    assert tasks == build_tasks(20, seconds=4, shots=3, seed=1)
    assert all(is_held_out(drawn(scene)) for task in tasks for scene in task.scenes)
    assert len({task.prompts for task in tasks}) == 20
    assert all(a.background != b.background for task in tasks for a, b in pairwise(task.scenes))
    assert tasks[0].starts == [0, 96, 192]
    assert not {task.prompts for task in tasks} & {task.prompts for task in build_tasks(20, seconds=4, shots=3, seed=2)}


def test_perfect_videos_score_full_and_the_report_is_written(tmp_path: Path) -> None:
    tasks = build_tasks(2, seconds=2, seed=0)
    by_prompt = {task.prompts: task for task in tasks}
    calls = []

    def generate(prompts: list[str], seconds: float, seed: int) -> Iterator[np.ndarray]:
        calls.append((seconds, seed))
        yield from np.array_split(film(by_prompt[tuple(prompts)]), 3)

    report = evaluate(generate, tasks, out=tmp_path)
    assert calls == [(2, 0), (2, 1)]
    assert all(score.share == 1.0 for name, score in report.opening.items() if name != "motion")
    assert report.curves["color"] == report.curves["shape"] == [1.0] * 2
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["opening"]["color"]["right"] == 2
    assert [video["shots"][0]["prompt"] for video in record["videos"]] == [task.prompts[0] for task in tasks]
    assert Image.open(tmp_path / "scores.png").size == (760, 380)
    assert (tmp_path / "successes.png").exists() and not (tmp_path / "failures.png").exists()


def test_a_video_of_another_prompt_fails(tmp_path: Path) -> None:
    task, shown = build_tasks(2, seconds=1.5, seed=0)
    report = evaluate(lambda *_: [film(shown)], [task], out=tmp_path)
    assert report.opening["color"].right + report.opening["shape"].right < 2
    assert report.confusions
    assert (tmp_path / "failures.png").exists()


def test_shots_are_judged_from_the_cuts_found() -> None:
    (task,) = build_tasks(1, seconds=2, shots=3, seed=4)
    result = judge_video(task, film(task, delay=-9))
    assert [shot.cut_frame for shot in result.shots] == [None, 48 - 9, 96 - 9]
    assert all(shot.cut_in_time and shot.shows_prompt for shot in result.shots)


@pytest.mark.parametrize("smear", [1, 4])
@pytest.mark.parametrize(("cut", "is_cut"), [(96, True), (70, True), (126, True), (134, False), (60, False)])
def test_cuts_are_found_within_one_chunk_of_where_they_were_asked(cut: int, is_cut: bool, smear: int) -> None:
    after = np.clip((np.arange(192) - cut + 1) / smear, 0, 1)[:, None, None, None]
    frames = (20 + 60 * after * np.ones((1, 16, 28, 3))).astype(np.uint8)
    frame = find_cut(frames, 96)
    assert (frame is not None and abs(frame - cut) <= smear) if is_cut else frame is None
    assert find_cut(frames, 96, after=cut + 5) is None


def test_motion_and_noise_are_no_cut() -> None:
    sprite = Sprite("square", "yellow", "large", "zigzag", "wrap")
    task = Task((Scene((sprite,), "black", 0),), ("",), (3.0,), 0)
    noise = np.random.default_rng(0).normal(0, 8, (72, 128, 224, 3))
    assert find_cut(np.clip(film(task) + noise, 0, 255).astype(np.uint8), 36) is None


def test_wilson_interval_matches_published_values() -> None:
    low, high = wilson_interval(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)  # Newcombe, Statistics in Medicine 17 (1998), table I
    assert Score(0, 0).share != Score(0, 0).share
