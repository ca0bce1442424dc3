"""Measure whether a video that continues footage continues what the footage shows.

The footage is a rendered scene of ShapeWorld with one object, and the model gets its frames and its caption. The judge
sees only generated frames. A change is the mean absolute difference of two frames, in levels of 255. "Seam" is the
change from the last frame of the footage, as the model's autoencoder returns it, to the first generated frame, and
"seam from the file" that from the frame of the file itself, which contains the error of the autoencoder. Both are
divided by the mean change of consecutive frames in the first second after the seam.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from longvideo.evaluation.judge import Verdict, compare, perceive
from longvideo.evaluation.shapeworld import FPS, QUESTIONS, Score, scores
from longvideo.pixels import to_uint8
from longvideo.shapeworld.batch import SceneBatch
from longvideo.shapeworld.captions import caption
from longvideo.shapeworld.render import render
from longvideo.shapeworld.world import Scene, sample_scene

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

FOOTAGE_SECONDS = 4.0
"""Length of the footage; more than a model with a window of 4 chunks attends to."""


@dataclass(frozen=True)
class ExtensionTask:
    """A scene, its caption, and the seed of the noise."""

    scene: Scene
    prompt: str
    seed: int

    def footage(self) -> Tensor:
        """Return the frames of the scene, uint8 [T, H, W, 3]."""
        times = torch.arange(round(FOOTAGE_SECONDS * FPS), dtype=torch.float64)[None] / FPS
        return to_uint8(render(SceneBatch.from_scenes([self.scene]), times))[0]


@dataclass(frozen=True)
class ExtensionResult:
    """The judgment of one video; the top of the file defines its changes.

    seam, file_seam: change at the seam, from the decoded footage and from the file. inside: mean change after it.
    """

    task: ExtensionTask
    verdict: Verdict
    seam: float
    file_seam: float
    inside: float


def build_extensions(num: int, *, seed: int = 0) -> list[ExtensionTask]:
    """Return tasks with held-out scenes of one object."""
    numbers = range(seed * num, (seed + 1) * num)
    scenes = [sample_scene(number, split="heldout", num_sprites=1) for number in numbers]
    return [ExtensionTask(scene, caption(scene, number), number) for number, scene in zip(numbers, scenes, strict=True)]


def judge_extension(task: ExtensionTask, last: np.ndarray, decoded: np.ndarray, frames: np.ndarray) -> ExtensionResult:
    """Judge one video.

    last: last frame of the footage, [H, W, 3], in the size of the video. decoded: the same from the autoencoder.
    frames: generated frames, uint8 [T, H, W, 3].
    """
    after = frames[: FPS + 1]
    return ExtensionResult(
        task,
        compare(perceive(frames, FPS), task.scene, from_start=False),
        seam=_change(decoded, frames[0]),
        file_seam=_change(last, frames[0]),
        inside=_change(after[:-1], after[1:]),
    )


def summarize_extensions(results: Sequence[ExtensionResult]) -> dict[str, Score]:
    """Return the score of each question about all videos."""
    return scores([result.verdict for result in results])


def seam_ratios(results: Sequence[ExtensionResult]) -> dict[str, float]:
    """Return the changes at all seams relative to those inside."""
    inside = sum(result.inside for result in results)
    return {
        "seam": sum(result.seam for result in results) / inside,
        "seam_from_the_file": sum(result.file_seam for result in results) / inside,
    }


def extensions_record(results: Sequence[ExtensionResult]) -> dict[str, Any]:
    """Return results and their scores for JSON."""
    return {
        "scores": {name: score.record() for name, score in summarize_extensions(results).items()},
        "ratios": {name: round(ratio, 4) for name, ratio in seam_ratios(results).items()},
        "videos": [asdict(result) for result in results],
    }


def wrong_questions(result: ExtensionResult) -> list[str]:
    """Return the questions that are answered wrongly."""
    return [name for name in QUESTIONS if getattr(result.verdict, name) is False]


def _change(before: np.ndarray, after: np.ndarray) -> float:
    return float(np.abs(before.astype(np.float32) - after).mean())
