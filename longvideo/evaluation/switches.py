"""Measure how soon a video shows a new prompt, and whether the scene continues.

A video is generated with one prompt, and with another from some chunk on. The judge sees only the pixels of each chunk.
"Shown" means that there is an object with the color and shape of the new prompt, and "number" that there is no other
object. "Continues" means that over the switch an object of the same shape stays in its place on the same background.
The frame at the switch may be a blend of both colors, which looks like two objects in one place; "number" checks
whether two remain at the end.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from longvideo.evaluation.judge import compare, perceive
from longvideo.evaluation.shapeworld import FPS, SECOND_STRIDE, Score
from longvideo.shapeworld.captions import caption
from longvideo.shapeworld.world import COLORS, Scene, sample_scene

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

SEAM_FRAMES = 4
"""Pixel frames on each side of the switch that are compared: those of one latent frame."""
LEAST_JUMP = 16.0
"""World units, an eighth of the height. Motion over a few frames is less; objects of a new shot rarely are so near."""

Change = Literal["color", "scene"]


@dataclass(frozen=True)
class SwitchTask:
    """The scenes and prompts before and after a switch, and the seed of the noise."""

    scenes: tuple[Scene, Scene]
    prompts: tuple[str, str]
    seed: int


@dataclass(frozen=True)
class SwitchResult:
    """The judgment of one switch; the top of the file defines "shown", "number" and "continues".

    shown: for each chunk with the new prompt. number: for the last of these chunks. continues: whether the scene
    continues over the switch. late: number of chunks from the one in progress when the prompt changed to the first that
    shows the new prompt; None if no chunk shows it.
    """

    task: SwitchTask
    shown: tuple[bool, ...]
    number: bool
    continues: bool
    late: int | None


def build_switches(num: int, *, change: Change, seed: int = 0) -> list[SwitchTask]:
    """Return tasks of held-out scenes with one object.

    change: "color" for another color of the object after the switch, "scene" for another scene.
    """
    tasks = []
    for index in range(num):
        number = seed * num + index
        before = sample_scene(2 * number, split="heldout", num_sprites=1)
        if change == "color":
            names = tuple(COLORS)
            (sprite,) = before.sprites
            other = names[(names.index(sprite.color) + 1 + number % (len(names) - 1)) % len(names)]
            after = replace(before, sprites=(replace(sprite, color=other),))
        else:
            after = sample_scene(2 * number + 1, split="heldout", num_sprites=1)
        # equal seeds, so that captions differ only in what changes
        prompts = (caption(before, number), caption(after, number))
        tasks.append(SwitchTask((before, after), prompts, number))
    return tasks


def judge_switch(task: SwitchTask, before: np.ndarray, after: Sequence[np.ndarray], *, first_late: int) -> SwitchResult:
    """Judge a switch.

    before: frames [T, H, W, 3] of the last chunk before the switch. after: frames of each chunk after it. first_late:
    number of chunks from the one in progress when the prompt changed to the first of `after`.
    """
    verdicts = [
        compare(perceive(frames[::SECOND_STRIDE], FPS / SECOND_STRIDE), task.scenes[1], from_start=False)
        for frames in after
    ]
    shown = tuple(verdict.color and verdict.shape for verdict in verdicts)
    return SwitchResult(
        task,
        shown,
        number=verdicts[-1].count,
        continues=_continues(before[-SEAM_FRAMES:], after[0][:SEAM_FRAMES], task.scenes[0]),
        late=first_late + shown.index(True) if any(shown) else None,
    )


def summarize_switches(results: Sequence[SwitchResult]) -> dict[str, Score]:
    """Return scores of all results: "chunk 1" is "shown" in the first chunk with the new prompt, and so on."""
    chunks = len(results[0].shown)
    scores = {
        f"chunk {chunk + 1}": Score(sum(r.shown[chunk] for r in results), len(results)) for chunk in range(chunks)
    }
    for name in ("number", "continues"):
        scores[name] = Score(sum(getattr(result, name) for result in results), len(results))
    return scores


def latest_switch(results: Sequence[SwitchResult]) -> int | None:
    """Return the largest `late` of results; None if a video never shows its new prompt."""
    late = [result.late for result in results if result.late is not None]
    return max(late) if len(late) == len(results) else None


def switches_record(results: Sequence[SwitchResult], scores: Mapping[str, Score]) -> dict[str, Any]:
    """Return results and their scores for JSON."""
    return {
        **{name: score.record() for name, score in scores.items()},
        "late_at_most": latest_switch(results),
        "never_shown": [result.late for result in results].count(None),
        "switches": [asdict(result) for result in results],
    }


def _continues(before: np.ndarray, after: np.ndarray, scene: Scene) -> bool:
    old, new = (perceive(frames, FPS) for frames in (before, after))
    if len(old.sprites) != 1 or {old.background, new.background} != {scene.background}:
        return False
    (sprite,) = old.sprites
    return any(
        other.shape == sprite.shape
        and math.hypot(other.center_x - sprite.center_x, other.center_y - sprite.center_y) < LEAST_JUMP
        for other in new.sprites
    )
