"""Writes results.json files of `longvideo eval shapeworld` with chosen answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longvideo.evaluation.judge import Percept, Verdict
from longvideo.evaluation.request import Request, RequestedSprite
from longvideo.evaluation.shapeworld import ShotResult, Task, TaskResult, summarize, write_report

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

BALL = RequestedSprite("circle", "red", None, None)
ONE, TWO = Request((BALL,), None), Request((BALL, BALL), None)
NOTHING = Percept((), "gray", 0)


def verdict(wrong: Sequence[str] = (), *, objects: int = 1) -> Verdict:
    """Return a verdict in which all but the named answers are right."""
    return Verdict(
        color="color" not in wrong,
        shape="shape" not in wrong,
        size="size" not in wrong,
        motion="motion" not in wrong,
        background="background" not in wrong,
        count="count" not in wrong,
        both="both" not in wrong if objects == 2 else None,
    )


def video(seed: int, windows: Sequence[Verdict] = (), *, objects: int = 1, num_frames: int | None = None) -> TaskResult:
    """Return the result of a video of one shot, with the verdicts of its windows of 4 s."""
    scene = TWO if objects == 2 else ONE
    shot = ShotResult(f"prompt {seed}", scene, NOTHING, windows[0])
    return TaskResult(seed, num_frames or 96 * len(windows), (shot,), by_opening=tuple(windows))


def shots(seed: int, verdicts: Sequence[Verdict], cuts: Sequence[int | None]) -> TaskResult:
    """Return the result of a video with a shot of 4 s for each verdict. cuts: their frames, None for the first."""
    parts = [
        ShotResult(f"prompt {seed} {i}", ONE, NOTHING, verdict, 96 * i, cut)
        for i, (verdict, cut) in enumerate(zip(verdicts, cuts, strict=True))
    ]
    return TaskResult(seed, 96 * len(parts), tuple(parts))


def write(folder: Path, results: Sequence[TaskResult]) -> Path:
    """Write the results.json of an evaluation, and return its folder."""
    tasks = [
        Task(
            tuple(shot.scene for shot in result.shots),
            tuple(shot.prompt for shot in result.shots),
            (result.num_frames / 24 / len(result.shots),) * len(result.shots),
            result.seed,
        )
        for result in results
    ]
    write_report(summarize(results, tasks), folder)
    return folder
