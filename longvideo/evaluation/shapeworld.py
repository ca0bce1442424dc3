"""Measure a video generator on held-out ShapeWorld prompts with the classical-vision judge.

A task is a script of one or more shots, each with a scene, its caption and a length. The generator sees captions and
a seed alone; the judge sees pixels alone; the verdict compares what the judge saw with the scene.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from longvideo.evaluation.judge import Percept, Verdict, compare, perceive
from longvideo.evaluation.sheet import film_strip, plot_curves
from longvideo.shapeworld.captions import caption
from longvideo.shapeworld.world import Scene, sample_scene

FPS = 24
CHUNK_FRAMES = 32
OPENING_SECONDS = 4.0
CUT_LAG_FRAMES = 4  # a latent frame lasts 4 pixel frames, so a cut may be smeared over as many
CUT_DIFFERENCE = 8.0  # mean absolute grey levels across CUT_LAG_FRAMES; motion alone stays below 4
CUT_PROMINENCE = 2.0  # times the median of the clip
SHOWN_FAILURES = 12
QUESTIONS = ("count", "color", "shape", "size", "motion", "background", "both")

Generate = Callable[[list[str], float, int], Iterator[np.ndarray]]
"""(prompt of every shot, seconds of a shot, seed) -> uint8 [T, H, W, 3] pieces of one video, in order."""


@dataclass(frozen=True)
class Task:
    """One video to make and judge: `scenes` and `prompts` have an entry a shot, `seconds` is the length of a shot."""

    scenes: tuple[Scene, ...]
    prompts: tuple[str, ...]
    seconds: float
    seed: int

    @property
    def shot_frames(self) -> int:
        """Frames asked for in a shot."""
        return round(self.seconds * FPS)


@dataclass(frozen=True)
class ShotResult:
    """What one shot showed; `cut_frame` is None for the first shot and when no cut was found near `asked_frame`."""

    prompt: str
    scene: Scene
    percept: Percept
    verdict: Verdict
    asked_frame: int = 0
    cut_frame: int | None = None

    @property
    def cut_in_time(self) -> bool:
        """Say whether the shot began within one chunk of where it was asked."""
        return self.asked_frame == 0 or self.cut_frame is not None

    @property
    def shows_prompt(self) -> bool:
        """Say whether every object of the prompt is there with its color and shape."""
        return self.verdict.color and self.verdict.shape


@dataclass(frozen=True)
class TaskResult:
    """Verdicts on one video: every shot's opening, and each whole second of a video of one shot."""

    seed: int
    num_frames: int
    shots: tuple[ShotResult, ...]
    by_second: tuple[Verdict, ...] = ()
    by_opening: tuple[Verdict, ...] = ()  # consecutive windows of OPENING_SECONDS, long enough to see a motion


@dataclass(frozen=True)
class Score:
    """A share of right answers with the 95 % interval of Wilson (1927)."""

    right: int
    total: int
    share: float = field(init=False)
    low: float = field(init=False)
    high: float = field(init=False)

    def __post_init__(self) -> None:
        share, low, high = wilson_interval(self.right, self.total)
        object.__setattr__(self, "share", share)
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)


@dataclass(frozen=True)
class Report:
    """Everything an evaluation found. `opening` scores the first seconds; `curves` hold a share a second."""

    num_videos: int
    seconds: float
    num_shots: int
    opening: dict[str, Score]
    shots: dict[str, Score]
    curves: dict[str, list[float]]
    motion_curve: list[float]
    confusions: dict[str, int]
    results: tuple[TaskResult, ...]

    def summary(self) -> dict:
        """Return the numbers without the single videos, ready for JSON."""
        return {
            "num_videos": self.num_videos,
            "seconds": self.seconds,
            "num_shots": self.num_shots,
            "opening": {name: asdict(score) for name, score in self.opening.items()},
            "shots": {name: asdict(score) for name, score in self.shots.items()},
            "by_second": self.curves,
            "motion_by_opening": self.motion_curve,
            "confusions": self.confusions,
        }


def build_tasks(num: int, *, seconds: float, shots: int = 1, seed: int = 0, split: str = "heldout") -> list[Task]:
    """Return `num` tasks of `shots` shots. Neighbouring shots differ in background, so that a cut can be seen."""
    tasks = []
    for index in range(num):
        first = (seed * num + index) * shots * len(QUESTIONS)
        scenes: list[Scene] = []
        candidate = first
        while len(scenes) < shots:
            scene = sample_scene(candidate, split=split)
            if not scenes or scenes[-1].background != scene.background:
                scenes.append(scene)
            candidate += 1
        prompts = tuple(caption(scene, first + shot) for shot, scene in enumerate(scenes))
        tasks.append(Task(tuple(scenes), prompts, seconds, seed=seed * num + index))
    return tasks


def evaluate(generate: Generate, tasks: Sequence[Task], *, out: Path | None = None) -> Report:
    """Generate and judge every task one after another; with `out`, write results.json and pictures there."""
    return evaluate_videos(make_videos(generate, tasks), out=out)


def make_videos(generate: Generate, tasks: Iterable[Task]) -> Iterator[tuple[Task, np.ndarray]]:
    """Run `generate` on each task and yield the task with its whole video."""
    for task in tasks:
        yield task, np.concatenate(list(generate(list(task.prompts), task.seconds, task.seed)))


def evaluate_videos(videos: Iterable[tuple[Task, np.ndarray]], *, out: Path | None = None) -> Report:
    """Judge (task, uint8 [T, H, W, 3]) pairs as they arrive; with `out`, write results.json and pictures there."""
    results: list[TaskResult] = []
    failures: list[tuple[str, np.ndarray]] = []
    successes: list[tuple[str, np.ndarray]] = []
    tasks: list[Task] = []
    for task, frames in videos:
        result = judge_video(task, frames)
        tasks.append(task)
        results.append(result)
        shown = frames[:: max(1, len(frames) // 96)].copy()
        wrong = [f"shot {i + 1} {q}" for i, shot in enumerate(result.shots) for q in wrong_answers(shot.verdict)]
        line = " / ".join(task.prompts)
        if wrong and len(failures) < SHOWN_FAILURES:
            failures.append((f"[{', '.join(wrong)}] {line}", shown))
        elif not wrong and len(successes) < SHOWN_FAILURES:
            successes.append((line, shown))
    report = summarize(results, tasks)
    if out is not None:
        write_report(report, out, failures=failures, successes=successes)
    return report


def judge_video(task: Task, frames: np.ndarray) -> TaskResult:
    """Judge one video: shots at the cuts found, and for a single shot also every second to the end."""
    opening = round(OPENING_SECONDS * FPS)
    starts, cuts = shot_starts(frames, num_shots=len(task.scenes), shot_frames=task.shot_frames)
    shots = []
    for index, (scene, prompt) in enumerate(zip(task.scenes, task.prompts, strict=True)):
        end = starts[index + 1] - CUT_LAG_FRAMES if index + 1 < len(starts) else len(frames)
        window = frames[starts[index] : min(end, starts[index] + opening)]
        percept = perceive(window, FPS)
        shots.append(
            ShotResult(prompt, scene, percept, compare(percept, scene), index * task.shot_frames, cuts[index])
        )
    if len(task.scenes) > 1:
        return TaskResult(task.seed, len(frames), tuple(shots))
    scene = task.scenes[0]
    return TaskResult(
        task.seed,
        len(frames),
        tuple(shots),
        by_second=tuple(compare(perceive(window, FPS), scene) for window in whole_windows(frames, FPS)),
        by_opening=tuple(compare(perceive(window, FPS), scene) for window in whole_windows(frames, opening)),
    )


def whole_windows(frames: np.ndarray, length: int) -> Iterator[np.ndarray]:
    """Yield consecutive windows of `length` frames; a remainder of at least half the length counts as one."""
    for start in range(0, len(frames), length):
        window = frames[start : start + length]
        if len(window) * 2 >= length:
            yield window


def shot_starts(frames: np.ndarray, *, num_shots: int, shot_frames: int) -> tuple[list[int], list[int | None]]:
    """Return for each shot its first settled frame, and the cut found within one chunk of where it was asked."""
    starts: list[int] = [0]
    cuts: list[int | None] = [None]
    for shot in range(1, num_shots):
        asked = min(shot * shot_frames, len(frames) - 1)
        cut = find_cut(frames, asked)
        cuts.append(cut)
        starts.append(min((asked if cut is None else cut) + CUT_LAG_FRAMES, len(frames) - 1))
    return starts, cuts


def find_cut(frames: np.ndarray, asked: int, *, reach: int = CHUNK_FRAMES) -> int | None:
    """Return the frame at which the picture changes most within `reach` frames of `asked`, or None if none stands out.

    Compares frames CUT_LAG_FRAMES apart on a coarse grid, so that neither noise nor a smeared transition matters.
    """
    first, last = max(0, asked - reach - CUT_LAG_FRAMES), min(len(frames), asked + reach + CUT_LAG_FRAMES + 1)
    coarse = frames[first:last, ::4, ::4].astype(np.float32)
    if len(coarse) <= CUT_LAG_FRAMES:
        return None
    change = np.abs(coarse[CUT_LAG_FRAMES:] - coarse[:-CUT_LAG_FRAMES]).mean((1, 2, 3))
    peak = float(change.max())
    if peak < CUT_DIFFERENCE or peak < CUT_PROMINENCE * float(np.median(change)):
        return None
    # a sharp cut gives a plateau of CUT_LAG_FRAMES equal changes; its last one starts just before the cut
    cut = first + int(np.flatnonzero(change > 0.95 * peak)[-1]) + 1
    return cut if abs(cut - asked) <= reach else None


def summarize(results: Sequence[TaskResult], tasks: Sequence[Task]) -> Report:
    """Add the verdicts of all videos up."""
    first = [result.shots[0].verdict for result in results]
    every = [shot for result in results for shot in result.shots]
    shots = {}
    if any(len(result.shots) > 1 for result in results):
        shots = scores([shot.verdict for shot in every])
        later = [shot for result in results for shot in result.shots[1:]]
        shots["shows_prompt"] = Score(sum(shot.shows_prompt for shot in every), len(every))
        shots["cut_in_time"] = Score(sum(shot.cut_in_time for shot in later), len(later))
    seconds = max((len(result.by_second) for result in results), default=0)
    curves = {
        name: [share([r.by_second[i] for r in results if i < len(r.by_second)], name) for i in range(seconds)]
        for name in ("color", "shape", "background", "count")
    }
    openings = max((len(result.by_opening) for result in results), default=0)
    motion = [share([r.by_opening[i] for r in results if i < len(r.by_opening)], "motion") for i in range(openings)]
    return Report(
        num_videos=len(results),
        seconds=tasks[0].seconds if tasks else 0.0,
        num_shots=len(tasks[0].scenes) if tasks else 0,
        opening=scores(first),
        shots=shots,
        curves=curves,
        motion_curve=motion,
        confusions=count_confusions(every),
        results=tuple(results),
    )


def scores(verdicts: Sequence[Verdict]) -> dict[str, Score]:
    """Return a score for each question; `both` counts scenes of two objects alone."""
    found = {}
    for name in QUESTIONS:
        answers = [getattr(verdict, name) for verdict in verdicts if getattr(verdict, name) is not None]
        if answers:
            found[name] = Score(sum(answers), len(answers))
    return found


def share(verdicts: Sequence[Verdict], name: str) -> float:
    """Return the share of verdicts that answer `name` with yes."""
    return sum(bool(getattr(verdict, name)) for verdict in verdicts) / max(1, len(verdicts))


def wrong_answers(verdict: Verdict) -> list[str]:
    """Return the questions that `verdict` answers with no."""
    return [name for name in QUESTIONS if getattr(verdict, name) is False]


def count_confusions(shots: Iterable[ShotResult]) -> dict[str, int]:
    """Count (asked, seen) pairs that differ, as 'motion: left -> zigzag', the most frequent first."""
    counts: dict[str, int] = {}
    for shot in shots:
        for asked, seen in shot.verdict.pairs:
            for name in ("color", "shape", "size", "motion"):
                wanted, got = getattr(asked, name), getattr(seen, name) if seen is not None else "missing"
                if wanted != got:
                    key = f"{name}: {wanted} -> {got}"
                    counts[key] = counts.get(key, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def wilson_interval(right: int, total: int, z: float = 1.96) -> tuple[float, float, float]:
    """Return the share and the bounds of Wilson's score interval (JASA 22, 1927)."""
    if total == 0:
        return float("nan"), 0.0, 1.0
    p = right / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * np.sqrt(p * (1 - p) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return p, max(0.0, float(middle - half)), min(1.0, float(middle + half))


def write_report(
    report: Report,
    out: Path,
    *,
    failures: Sequence[tuple[str, np.ndarray]] = (),
    successes: Sequence[tuple[str, np.ndarray]] = (),
) -> None:
    """Write results.json, scores.png (where there is more than one second to plot) and contact sheets into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    record = report.summary() | {"videos": [asdict(result) for result in report.results]}
    (out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    seconds = len(report.curves.get("color", []))
    if seconds > 1:
        plot_curves(
            {name: report.curves[name] for name in ("color", "shape", "background")},
            [second + 1 for second in range(seconds)],
            title=f"Right in each second of {report.num_videos} videos from held-out prompts",
            x_label="seconds",
        ).save(out / "scores.png")
    for name, clips in (("failures.png", failures), ("successes.png", successes)):
        if clips:
            film_strip([frames for _, frames in clips], captions=[line for line, _ in clips], scale=0.6).save(
                out / name
            )
