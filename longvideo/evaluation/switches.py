"""Say how soon a video shows a new prompt, and whether the scene goes on meanwhile.

A video is made under one prompt, and under another one from some chunk on. The judge sees the pixels of each chunk
alone. "Shown": there is an object with the color and shape of the new prompt. "Number": there is no other. "Goes on":
over the switch an object of its shape stays where it is, before the same background. The frame at the switch may be a
blend of both colors, which is seen as two objects in one place; "number" says whether two are left in the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from longvideo.evaluation.judge import compare, perceive
from longvideo.evaluation.shapeworld import FPS, SECOND_STRIDE, Score
from longvideo.shapeworld.captions import caption
from longvideo.shapeworld.world import COLORS, Scene, sample_scene

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

SEAM_FRAMES = 4
"""On each side of the switch, as many as a latent frame lasts."""
LEAST_JUMP = 16.0
"""World units, an eighth of the height: motion over a few frames stays below, a new shot's place seldom does."""

Change = Literal["color", "scene"]


@dataclass(frozen=True)
class SwitchTask:
    """A scene and its prompt, the scene and prompt after it, and the seed of the noise."""

    scenes: tuple[Scene, Scene]
    prompts: tuple[str, str]
    seed: int


@dataclass(frozen=True)
class SwitchResult:
    """shown: for each chunk from the first that is made under the new prompt. number: in the last of these. See the top
    of the file.

    late: chunks between the one that was being made when the prompt was given and the first that shows it; None if none
    does.
    """

    task: SwitchTask
    shown: tuple[bool, ...]
    number: bool
    continues: bool
    late: int | None


def build_switches(num: int, *, change: Change, seed: int = 0) -> list[SwitchTask]:
    """Return tasks of held-out scenes with one object; another color of it, or another scene, comes after."""
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
        # the same words, but for what changes
        prompts = (caption(before, number), caption(after, number))
        tasks.append(SwitchTask((before, after), prompts, number))
    return tasks


def judge_switch(task: SwitchTask, before: np.ndarray, after: Sequence[np.ndarray], *, first_late: int) -> SwitchResult:
    """Judge frames [T, H, W, 3] of the last chunk before a switch and of each one after it.

    first_late: how many chunks the first of `after` is behind the one that was being made when the prompt was given.
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
    """Add results up: shown in the first chunk under the new prompt, in the second, and so on; and how many go on."""
    chunks = len(results[0].shown)
    scores = {
        f"chunk {chunk + 1}": Score(sum(r.shown[chunk] for r in results), len(results)) for chunk in range(chunks)
    }
    for name in ("number", "continues"):
        scores[name] = Score(sum(getattr(result, name) for result in results), len(results))
    return scores


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
