"""Paired differences equal those computed by hand, and results of other videos are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from longvideo.errors import UserError
from longvideo.evaluation.comparison import PairedDifference, compare_results, paired_difference
from longvideo.evaluation.results_file import read_results
from longvideo.evaluation.shapeworld import QUESTIONS, TaskResult
from tests.evaluation.results import shots, verdict, video, write


def compared(folder: Path, base: list[TaskResult], other: list[TaskResult]) -> dict[str, dict[str, PairedDifference]]:
    """Compare two evaluations through their files; return the differences by the heading of a part and by question."""
    first, second = write(folder / "base", base), write(folder / "other", other)
    parts = compare_results(read_results(first), read_results(second / "results.json"))
    assert [part.name for part in parts] in (["first"], ["whole", "first", "last"])
    return {part.heading: part.differences for part in parts}


def test_the_interval_is_that_of_the_mean_difference_of_a_video() -> None:
    # d = 0, -1, 0, 1, -1, 0, 0, 0: mean -1/8, sum of squares 3 - 8/64 = 23/8, variance 23/56
    base, other = [1, 1, 0, 0, 1, 1, 1, 1], [1, 0, 0, 1, 0, 1, 1, 1]
    difference = paired_difference(base, other)
    assert (difference.num_videos, difference.base, difference.other) == (8, 75, 62.5)
    half = 100 * 1.96 * math.sqrt(23 / 56 / 8)
    assert difference.points == -12.5
    assert difference.low == pytest.approx(-12.5 - half) and difference.high == pytest.approx(-12.5 + half)
    opposite = paired_difference(other, base)
    assert opposite.points == 12.5 and opposite.high == pytest.approx(12.5 + half)


def test_equal_answers_have_an_interval_without_width_and_one_video_has_none() -> None:
    equal = paired_difference([1, 0, 1], [1, 0, 1])
    assert (equal.points, equal.low, equal.high) == (0, 0, 0)
    single = paired_difference([1], [0])
    assert (single.points, single.low, single.high) == (-100, None, None)


@pytest.mark.parametrize(("videos", "worse", "bar"), [(200, 6, 3), (1000, 33, 3.3), (300, 7, 2.333333333)])
def test_a_difference_of_the_bar_is_within_and_one_more_video_is_not(videos: int, worse: int, bar: float) -> None:
    base = [1] * videos
    exact = paired_difference(base, [0] * worse + [1] * (videos - worse))
    assert exact.is_within(bar)
    assert not paired_difference(base, [0] * (worse + 1) + [1] * (videos - worse - 1)).is_within(bar)
    # the interval reaches below the bar, which does not count
    assert exact.low is not None and exact.low < -bar


def test_a_better_result_is_within_a_bar_of_zero() -> None:
    assert paired_difference([0, 1], [1, 1]).is_within(0)
    assert paired_difference([1, 1], [1, 1]).is_within(0)
    assert not paired_difference([1, 1], [0, 1]).is_within(0)


def test_both_is_a_difference_over_the_videos_of_two_objects(tmp_path: Path) -> None:
    base = [video(seed, [verdict(objects=objects)], objects=objects) for seed, objects in enumerate((1, 2, 2, 1))]
    wrong = verdict(["shape", "both"], objects=2)
    other = [base[0], video(1, [wrong], objects=2), *base[2:]]
    (differences,) = compared(tmp_path, base, other).values()
    assert list(differences) == list(QUESTIONS)
    assert (differences["both"].num_videos, differences["both"].points) == (2, -50)
    assert (differences["shape"].num_videos, differences["shape"].points) == (4, -25)
    assert (differences["color"].num_videos, differences["color"].points) == (4, 0)


def test_both_has_no_row_without_videos_of_two_objects(tmp_path: Path) -> None:
    (differences,) = compared(tmp_path, [video(0, [verdict()])], [video(0, [verdict()])]).values()
    assert list(differences) == list(QUESTIONS[:-1])


def test_a_drift_shows_in_the_last_window_and_videos_are_the_units(tmp_path: Path) -> None:
    right, wrong = verdict(), verdict(["shape"])
    base = [video(seed, [right] * 4) for seed in range(3)]
    other = [video(0, [right, right, wrong, wrong]), video(1, [right, right, right, wrong]), base[2]]
    parts = compared(tmp_path, base, other)
    assert list(parts) == ["whole video", "first 4 s", "12 to 16 s"]
    assert parts["first 4 s"]["shape"].points == 0
    assert parts["12 to 16 s"]["shape"].points == pytest.approx(-200 / 3)
    # shares of the videos 1/2, 3/4, 1: mean -1/4, standard deviation 1/4, over 3 videos and not 12 windows
    whole = parts["whole video"]["shape"]
    assert (whole.num_videos, whole.base, whole.other, whole.points) == (3, 100, 75, -25)
    assert whole.low == pytest.approx(-25 - 1.96 * 25 / math.sqrt(3))


@pytest.mark.parametrize(
    ("frames", "heading"), [([192, 192], "4 to 8 s"), ([150, 150], "4 to 6.2 s"), ([192, 288], "last window")]
)
def test_the_last_window_is_named_by_its_seconds(frames: list[int], heading: str, tmp_path: Path) -> None:
    results = [video(i, [verdict()] * round(length / 96), num_frames=length) for i, length in enumerate(frames)]
    assert list(compared(tmp_path, results, results))[-1] == heading


def test_shots_are_compared_with_their_prompts_and_cuts(tmp_path: Path) -> None:
    right, wrong = verdict(), verdict(["color"])
    base = [shots(seed, [right] * 3, [None, 96, 192]) for seed in range(2)]
    other = [shots(0, [right, right, wrong], [None, None, 200]), base[1]]
    parts = compared(tmp_path, base, other)
    assert list(parts) == ["every shot", "first shot", "last shot"]
    every, first, last = parts.values()
    assert every["color"].points == every["shows_prompt"].points == pytest.approx(-100 / 6)
    # only two shots of a video begin with a cut
    assert every["cut_in_time"].points == -25 and last["cut_in_time"].points == 0
    assert first["shows_prompt"].points == 0 and "cut_in_time" not in first
    assert last["color"].points == -50


BASE = [video(seed, [verdict(), verdict()]) for seed in range(3)]


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (BASE[:2], "it has 2 videos, not 3"),
        ([*BASE[:2], video(7, [verdict()] * 2)], "the seed of its video 3 is 7, not 2"),
        (
            [BASE[0], video(1, [verdict()] * 2, num_frames=191), BASE[2]],
            "the number of frames of its video 2 is 191, not 192",
        ),
        (
            [BASE[0], shots(1, [verdict()] * 2, [None, 96]), BASE[2]],
            "the number of shots of its video 2 is 2, not 1",
        ),
        (
            [BASE[0], video(1, [verdict(objects=2)] * 2, objects=2), BASE[2]],
            "the expected scene of shot 1 of its video 2 is ",
        ),
    ],
)
def test_results_of_other_videos_are_refused_with_the_first_difference(
    other: list[TaskResult], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="use results of the same prompts, seeds, lengths and shots") as error:
        compared(tmp_path, BASE, other)
    expected = f"cannot compare {tmp_path}/other/results.json with {tmp_path}/base/results.json: {problem}"
    assert str(error.value).startswith(expected) and "\n" not in str(error.value)


def test_another_prompt_is_refused_by_its_words(tmp_path: Path) -> None:
    folder = write(tmp_path / "base", BASE)
    other = tmp_path / "other.json"
    other.write_text((folder / "results.json").read_text().replace("prompt 1", "a red ball"))
    with pytest.raises(UserError, match="the prompt of shot 1 of its video 2 is 'a red ball', not 'prompt 1'"):
        compare_results(read_results(folder), read_results(other))


def test_older_files_with_another_name_of_the_expected_frame_are_read(tmp_path: Path) -> None:
    folder = write(tmp_path, [shots(0, [verdict()] * 2, [None, 96])])
    text = (folder / "results.json").read_text()
    (tmp_path / "old.json").write_text(text.replace("expected_frame", "asked_frame"))
    assert read_results(tmp_path / "old.json").videos == read_results(folder).videos


MISSING = object()


def change(record: Any, path: list[Any], value: object) -> None:
    """Set the value at a path in a JSON object, or remove it."""
    *parents, last = path
    for key in parents:
        record = record[key]
    if value is MISSING:
        del record[last]
    else:
        record[last] = value


VERDICT = ("videos", 0, "shots", 0, "verdict")


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (["videos"], MISSING, "the file has no videos"),
        (["videos"], [], "videos of the file is empty"),
        (["videos"], {}, "videos of the file is an object, expected a list"),
        (["videos", 1], "x", "videos[1] has no shots"),
        (["videos", 0, "seed"], True, "seed of videos[0] is true or false, expected a whole number"),
        (["videos", 0, "by_opening"], MISSING, "videos[0] has no by_opening"),
        (["videos", 0, "shots"], [], "shots of videos[0] is empty"),
        ([*VERDICT, "color"], 1, "color of videos[0].shots[0].verdict is a whole number, expected true or false"),
        ([*VERDICT, "color"], None, "color of videos[0].shots[0].verdict is null, expected true or false"),
        ([*VERDICT, "both"], MISSING, "videos[0].shots[0].verdict has no both"),
    ],
)
def test_files_of_another_kind_are_refused(path: list[Any], value: object, problem: str, tmp_path: Path) -> None:
    file = write(tmp_path, BASE) / "results.json"
    record = json.loads(file.read_text())
    change(record, path, value)
    file.write_text(json.dumps(record))
    with pytest.raises(UserError) as error:
        read_results(tmp_path)
    remedy = "use a folder that this command wrote"
    assert str(error.value) == f"{file} is not a result of longvideo eval shapeworld: {problem}; {remedy}"
