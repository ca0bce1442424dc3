"""Measure a video generator on held-out ShapeWorld prompts with the classical-vision judge.

A task is a script of one or more shots, each with a scene, its caption and a length. The generator gets only captions
and a seed, and the judge gets only pixels; the verdict compares the result of the judge with the scene.
"""

from __future__ import annotations

import math
import multiprocessing
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from longvideo.evaluation.judge import ExpectedScene, Percept, Verdict, compare, judge, perceive
from longvideo.evaluation.sheet import film_strip, plot_curves, spaced_indices, write_picture
from longvideo.files import write_json
from longvideo.shapeworld.captions import caption
from longvideo.shapeworld.world import Scene, Split, sample_scene

if TYPE_CHECKING:
    from pathlib import Path

FPS = 24
CHUNK_FRAMES = 32
OPENING_SECONDS = 4.0
CUT_LAG_FRAMES = 4  # a latent frame encodes 4 pixel frames, so a cut may be blurred over as many
CHANGED_LEVELS = 40  # gray levels by which a pixel counts as changed; noise is less
CUT_SHARE = 0.01  # least share of changed pixels at a cut: a small object that jumps changes 0.025
CUT_PROMINENCE = 1.35  # least ratio to the share that motion changes at other times
SHOWN_CLIPS = 12
SHOWN_FRAMES = 8
SECOND_STRIDE = 3  # every third frame is enough for color and shape
QUESTIONS = ("count", "color", "shape", "size", "motion", "background", "both")

Generate = Callable[[list[str], float, int], Iterable[np.ndarray]]
"""Function (prompts of all shots, total seconds, seed) -> pieces uint8 [T, H, W, 3] of one video, in order."""


@dataclass(frozen=True)
class Task:
    """One video to generate and judge. scenes, prompts, seconds: one entry for each shot. seed: of the noise."""

    scenes: tuple[ExpectedScene, ...]
    prompts: tuple[str, ...]
    seconds: tuple[float, ...]
    seed: int

    @property
    def starts(self) -> list[int]:
        """Frame at which each shot is expected to begin."""
        return [round(sum(self.seconds[:shot]) * FPS) for shot in range(len(self.scenes))]


@dataclass(frozen=True)
class ShotResult:
    """The judgment of one shot.

    expected_frame: frame at which it should begin. cut_frame: frame of its cut; None for the first shot, and
    without a cut near the expected frame.
    """

    prompt: str
    scene: ExpectedScene
    percept: Percept
    verdict: Verdict
    expected_frame: int = 0
    cut_frame: int | None = None

    @property
    def cut_in_time(self) -> bool:
        """Whether the shot begins within one chunk of the expected frame."""
        return self.expected_frame == 0 or self.cut_frame is not None

    @property
    def shows_prompt(self) -> bool:
        """Whether every object of the prompt is in the shot with its color and shape."""
        return self.verdict.color and self.verdict.shape


@dataclass(frozen=True)
class TaskResult:
    """The judgment of one video.

    shots: the opening of each shot. by_second: each second of a video of one shot. by_opening: consecutive windows of
    OPENING_SECONDS, which is long enough to recognize a motion.
    """

    seed: int
    num_frames: int
    shots: tuple[ShotResult, ...]
    by_second: tuple[Verdict, ...] = ()
    by_opening: tuple[Verdict, ...] = ()


@dataclass(frozen=True)
class Score:
    """Number of correct answers, and of all answers."""

    right: int
    total: int

    @property
    def share(self) -> float:
        """Share of correct answers; NaN without answers."""
        return self.right / self.total if self.total else float("nan")

    def record(self) -> dict[str, float]:
        """Return the numbers with the 95 % interval, for JSON."""
        low, high = wilson_interval(self.right, self.total)
        rounded = {"share": round(self.share, 4), "low": round(low, 4), "high": round(high, 4)}
        return {"right": self.right, "total": self.total, **rounded}


@dataclass(frozen=True)
class EvaluationReport:
    """The result of an evaluation.

    num_videos, num_shots: numbers of videos, and of shots in a video. seconds: length of the longest video. opening:
    scores of the first OPENING_SECONDS. shots: scores of all shots, for videos of several. curves: share of correct
    answers in each second. motion_curve: share of correct motions in consecutive windows of OPENING_SECONDS.
    confusions: number of each wrong answer. results: of the single videos.
    """

    num_videos: int
    seconds: float
    num_shots: int
    opening: dict[str, Score]
    shots: dict[str, Score]
    curves: dict[str, list[float]]
    motion_curve: list[float]
    confusions: dict[str, int]
    results: tuple[TaskResult, ...]

    def summary(self) -> dict[str, Any]:
        """Return the numbers without the single videos, for JSON."""
        return {
            "num_videos": self.num_videos,
            "seconds": self.seconds,
            "num_shots": self.num_shots,
            "opening": {name: score.record() for name, score in self.opening.items()},
            "shots": {name: score.record() for name, score in self.shots.items()},
            "by_second": self.curves,
            "motion_by_opening": self.motion_curve,
            "confusions": self.confusions,
        }


def build_tasks(num: int, *, seconds: float, shots: int = 1, seed: int = 0, split: Split = "heldout") -> list[Task]:
    """Return `num` tasks of `shots` shots of `seconds` each.

    Consecutive shots have different backgrounds: with the same one, a cut between small objects changes few pixels.
    """
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
        tasks.append(Task(tuple(scenes), prompts, (seconds,) * shots, seed=seed * num + index))
    return tasks


def evaluate(
    generate: Generate, tasks: Sequence[Task], *, out: Path | None = None, workers: int = 1
) -> EvaluationReport:
    """Generate and judge every task; see `evaluate_videos`."""
    return evaluate_videos(make_videos(generate, tasks), out=out, workers=workers)


def make_videos(generate: Generate, tasks: Iterable[Task]) -> Iterator[tuple[Task, np.ndarray]]:
    """Generate the video of each task; yield the task with the whole video, uint8 [T, H, W, 3]."""
    for task in tasks:
        yield task, np.concatenate(list(generate(list(task.prompts), sum(task.seconds), task.seed)))


def evaluate_videos(
    videos: Iterable[tuple[Task, np.ndarray]], *, out: Path | None = None, workers: int = 1
) -> EvaluationReport:
    """Judge pairs of a task and its video, uint8 [T, H, W, 3], in the order in which they are generated.

    out: folder for results.json and pictures; None writes none. workers: processes that judge while the next videos are
    generated; 1 judges in this process.
    """
    tasks: list[Task] = []
    results: list[TaskResult] = []
    right: list[tuple[str, np.ndarray]] = []
    wrong: list[tuple[str, np.ndarray]] = []
    for task, shown, result in judge_videos(videos, workers=workers):
        tasks.append(task)
        results.append(result)
        number = "" if len(result.shots) == 1 else " {}"
        failed = [q + number.format(i) for i, shot in enumerate(result.shots, 1) for q in wrong_answers(shot.verdict)]
        line = f"{task.seed}: {' / '.join(task.prompts)}"
        clips, line = (wrong, f"wrong: {', '.join(failed)} | {line}") if failed else (right, line)
        if len(clips) < SHOWN_CLIPS:
            clips.append((line, shown))
    report = summarize(results, tasks)
    if out is not None:
        write_report(report, out, failures=wrong, successes=right)
    return report


def judge_videos(
    videos: Iterable[tuple[Task, np.ndarray]], *, workers: int
) -> Iterator[tuple[Task, np.ndarray, TaskResult]]:
    """Yield each task with a few frames of its video and the result, in order. workers: as in `evaluate_videos`."""

    def few(frames: np.ndarray) -> np.ndarray:
        return frames[spaced_indices(len(frames), SHOWN_FRAMES)]

    if workers <= 1:
        for task, frames in videos:
            yield task, few(frames), judge_video(task, frames)
        return
    # a forked process would inherit the CUDA context of its parent
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting: deque[tuple[Task, np.ndarray, Future[TaskResult]]] = deque()
        for task, frames in videos:
            waiting.append((task, few(frames), pool.submit(judge_video, task, frames)))
            while len(waiting) > 2 * workers or (waiting and waiting[0][2].done()):
                done, shown, future = waiting.popleft()
                yield done, shown, future.result()
        for done, shown, future in waiting:
            yield done, shown, future.result()


def judge_video(task: Task, frames: np.ndarray) -> TaskResult:
    """Judge one video: each shot from its cut on, and for a video of one shot also every second."""
    opening = round(OPENING_SECONDS * FPS)
    cuts: list[int | None] = [None]
    for start in task.starts[1:]:
        cuts.append(find_cut(frames, start, after=(cuts[-1] or 0) + CUT_LAG_FRAMES))
    # a shot is judged from its cut on, or from its expected start if there is no cut
    begins = [start if cut is None else cut for start, cut in zip(task.starts, cuts, strict=True)]
    shots = []
    for index, (scene, prompt) in enumerate(zip(task.scenes, task.prompts, strict=True)):
        first = min(begins[index] + (CUT_LAG_FRAMES if index else 0), len(frames) - 1)
        last = begins[index + 1] - CUT_LAG_FRAMES if index + 1 < len(begins) else len(frames)
        percept = perceive(frames[first : max(first + 1, min(last, first + opening))], FPS)
        shots.append(ShotResult(prompt, scene, percept, compare(percept, scene), task.starts[index], cuts[index]))
    (scene, *others) = task.scenes
    return TaskResult(
        task.seed,
        len(frames),
        tuple(shots),
        by_second=() if others else judge_windows(frames, scene, FPS, stride=SECOND_STRIDE),
        by_opening=() if others else judge_windows(frames, scene, opening),
    )


def judge_windows(frames: np.ndarray, scene: ExpectedScene, length: int, *, stride: int = 1) -> tuple[Verdict, ...]:
    """Judge every `stride`-th frame of consecutive windows of `length` frames; the last may have half the length."""
    starts = [start for start in range(0, len(frames), length) if 2 * (len(frames) - start) >= length]
    return tuple(
        judge(frames[start : start + length : stride], scene, FPS / stride, from_start=start == 0) for start in starts
    )


def find_cut(frames: np.ndarray, expected: int, *, after: int = 0, reach: int = CHUNK_FRAMES) -> int | None:
    """Return the frame of a cut, at which most pixels change; None if no frame is prominent.

    expected: expected frame. after: earliest frame. reach: largest distance from `expected`, frames. Frames at a
    distance of CUT_LAG_FRAMES are compared, so that a blurred transition counts as one cut.
    """
    first, last = max(after, expected - reach - CUT_LAG_FRAMES), min(len(frames), expected + reach + CUT_LAG_FRAMES + 1)
    coarse = frames[first:last, ::2, ::2].astype(np.int16)
    if len(coarse) <= CUT_LAG_FRAMES:
        return None
    change = (np.abs(coarse[CUT_LAG_FRAMES:] - coarse[:-CUT_LAG_FRAMES]).max(-1) > CHANGED_LEVELS).mean((1, 2))
    peak = int(change.argmax())
    elsewhere = change[np.abs(np.arange(len(change)) - peak) > 2 * CUT_LAG_FRAMES]
    usual = float(np.percentile(elsewhere, 90)) if len(elsewhere) else 0.0
    if change[peak] < max(CUT_SHARE, CUT_PROMINENCE * usual):
        return None
    # a sharp cut gives a plateau of CUT_LAG_FRAMES equal changes, of which the last begins just before the cut
    plateau = np.flatnonzero((change > 0.9 * change[peak]) & (np.abs(np.arange(len(change)) - peak) < CUT_LAG_FRAMES))
    cut = first + int(plateau[-1]) + 1
    return cut if abs(cut - expected) <= reach else None


def summarize(results: Sequence[TaskResult], tasks: Sequence[Task]) -> EvaluationReport:
    """Combine the results of all videos into a report."""
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
    return EvaluationReport(
        num_videos=len(results),
        seconds=max((sum(task.seconds) for task in tasks), default=0.0),
        num_shots=max((len(task.scenes) for task in tasks), default=0),
        opening=scores(first),
        shots=shots,
        curves=curves,
        motion_curve=motion,
        confusions=count_confusions(shot.verdict for shot in every),
        results=tuple(results),
    )


def scores(verdicts: Sequence[Verdict]) -> dict[str, Score]:
    """Return a score for each question; "both" counts only scenes with two objects."""
    result = {}
    for name in QUESTIONS:
        answers = [getattr(verdict, name) for verdict in verdicts if getattr(verdict, name) is not None]
        if answers:
            result[name] = Score(sum(answers), len(answers))
    return result


def share(verdicts: Sequence[Verdict], name: str) -> float:
    """Return the share of verdicts in which a property is correct."""
    return sum(bool(getattr(verdict, name)) for verdict in verdicts) / max(1, len(verdicts))


def wrong_answers(verdict: Verdict) -> list[str]:
    """Return the properties that are not correct."""
    return [name for name in QUESTIONS if getattr(verdict, name) is False]


def count_confusions(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """Count the confusions, such as 'motion: left -> zigzag', the most frequent first."""
    return dict(Counter(name for verdict in verdicts for name in confusion_names(verdict)).most_common())


def confusion_names(verdict: Verdict) -> Iterator[str]:
    """Yield 'property: expected -> seen' for every difference."""
    for expected, seen in verdict.pairs:
        for name in ("color", "shape", "size", "motion"):
            value, actual = getattr(expected, name), getattr(seen, name) if seen is not None else "missing"
            if value not in (None, actual):
                yield f"{name}: {value} -> {actual}"


def wilson_interval(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Return the bounds of Wilson's score interval for a share (Wilson, JASA 22, 1927). z: 1.96 for 95 %."""
    if total == 0:
        return 0.0, 1.0
    share = right / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def write_report(
    report: EvaluationReport,
    out: Path,
    *,
    failures: Sequence[tuple[str, np.ndarray]] = (),
    successes: Sequence[tuple[str, np.ndarray]] = (),
) -> None:
    """Write results.json, scores.png (if there is more than one second) and contact sheets to a folder.

    failures, successes: captions and clips for the contact sheets.
    """
    out.mkdir(parents=True, exist_ok=True)
    record = report.summary() | {"videos": [asdict(result) for result in report.results]}
    write_json(out / "results.json", record)
    seconds = len(report.curves.get("color", []))
    if seconds > 1:
        scores = plot_curves(
            {name: report.curves[name] for name in ("color", "shape", "background")},
            [second + 1 for second in range(seconds)],
            title=f"Correct in each second of {report.num_videos} videos of held-out prompts",
            x_label="seconds",
        )
        write_picture(scores, out / "scores.png")
    for name, clips in (("failures.png", failures), ("successes.png", successes)):
        if clips:
            sheet = film_strip([frames for _, frames in clips], captions=[line for line, _ in clips], scale=0.6)
            write_picture(sheet, out / name)
