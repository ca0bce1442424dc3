"""Videos for `longvideo eval`: generated for its tasks, or read from a folder."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from longvideo.evaluation.shapeworld import Task
    from longvideo.evaluation.switches import SwitchResult, SwitchTask
    from longvideo.infer.pipeline import StreamingPipeline
    from longvideo.infer.timeline import SwitchMode

SWITCH_CHUNKS = 4
"""Chunks before a change of prompt, and after it."""


def generate_videos(
    pipeline: StreamingPipeline, tasks: list[Task], *, batch: int, steps: int | None, guidance: float | None
) -> Iterator[tuple[Task, np.ndarray]]:
    """Yield each task with its generated video, uint8 [T, H, W, 3]. batch: videos that are generated together."""
    from longvideo.evaluation.shapeworld import make_videos

    if batch == 1:
        yield from make_videos(
            lambda prompts, seconds, seed: pipeline.stream(
                prompts, seconds=seconds, steps=steps, guidance=guidance, seed=seed
            ),
            tasks,
        )
        return
    for start in range(0, len(tasks), batch):
        group = tasks[start : start + batch]
        frames = pipeline.generate_batch(
            [list(task.prompts) for task in group],
            seconds=list(group[0].seconds),
            seeds=[task.seed for task in group],
            steps=steps,
            guidance=guidance,
        )
        yield from zip(group, frames, strict=True)


def show_switch(
    pipeline: StreamingPipeline, task: SwitchTask, mode: SwitchMode, steps: int | None
) -> tuple[SwitchResult, np.ndarray]:
    """Generate a video whose prompt changes, and judge it; return the result and the frames around the change."""
    import numpy as np

    from longvideo.evaluation.switches import judge_switch

    chunks: dict[int, list[np.ndarray]] = {}
    receipt = None
    with pipeline.session(task.prompts[0], seed=task.seed, steps=steps) as session:
        for chunk in session:
            index = chunk.step.index
            chunks.setdefault(index, []).append(chunk.frames[0])
            if receipt is None and index == SWITCH_CHUNKS - 1:
                receipt = session.set_prompt(task.prompts[1], mode)
            if receipt is not None and index == receipt.effective_at + SWITCH_CHUNKS - 1:
                break
    assert receipt is not None
    whole = [np.concatenate(parts) for parts in chunks.values()]
    result = judge_switch(
        task,
        whole[receipt.effective_at - 1],
        whole[receipt.effective_at :],
        first_late=receipt.effective_at - receipt.accepted_at,
    )
    return result, np.concatenate(whole[receipt.effective_at - SWITCH_CHUNKS :])


def shown_chunks(result: SwitchResult) -> str:
    """Return which of the chunks after a change of prompt show the new one, as text."""
    numbers = [str(number) for number, is_shown in enumerate(result.shown, 1) if is_shown]
    return f"shown in chunks: {', '.join(numbers) or 'none'}"


def read_tasks(folder: Path) -> list[Task]:
    """Return the tasks of a folder's manifest.jsonl; the captions describe the expected content of each shot."""
    from longvideo.data.manifest import read_manifest
    from longvideo.data.timing import measure
    from longvideo.evaluation.request import read_caption
    from longvideo.evaluation.shapeworld import Task

    tasks = []
    for index, video in enumerate(measure(read_manifest(folder / "manifest.jsonl"))):
        starts = [shot.start for shot in video.shots] + [video.shots[-1].end]
        captions = tuple(shot.caption for shot in video.shots)
        seconds = tuple(b - a for a, b in pairwise(starts))
        tasks.append(Task(tuple(read_caption(text) for text in captions), captions, seconds, seed=index))
    return tasks


def read_videos(folder: Path, tasks: list[Task]) -> Iterator[tuple[Task, np.ndarray]]:
    """Yield the tasks of `read_tasks` with their videos, at the judge's frame rate and without frames before the first
    shot and after the last one."""
    from longvideo.data.manifest import read_manifest
    from longvideo.data.timing import measure
    from longvideo.data.video import VideoReader
    from longvideo.evaluation.shapeworld import FPS

    videos = measure(read_manifest(folder / "manifest.jsonl"))
    for task, video in zip(tasks, videos, strict=False):
        first = video.shots[0].start
        count = max(1, round(sum(task.seconds) * FPS))
        yield task, VideoReader(FPS).read(video.video, start_seconds=first, max_frames=count).numpy()
