"""`longvideo eval compare` compares what `eval shapeworld` wrote, as a table and as JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from longvideo.cli.main import main
from tests.evaluation.results import verdict, video, write

QUESTIONS = ["count", "color", "shape", "size", "motion", "background"]


def rows(text: str) -> dict[str, list[str]]:
    """Return the cells after the question of each row of a table with one part."""
    lines = [line.split() for line in text.splitlines() if line.startswith(" first")]
    return {words[3]: words[4:] for words in lines}


def judged(folder: Path, out: Path) -> dict[str, Any]:
    assert main(["eval", "shapeworld", "--videos", str(folder), "-o", str(out)]) == 0
    return json.loads((out / "results.json").read_text())


def test_real_videos_and_swapped_ones_differ_by_what_was_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, swapped = tmp_path / "data", tmp_path / "swapped"
    options = ["--clips", "3", "--seconds", "4", "--split", "heldout"]
    assert main(["data", "shapeworld", "-o", str(data), *options]) == 0
    shutil.copytree(data, swapped)
    first, second, _ = (Path(json.loads(line)["video"]) for line in (data / "manifest.jsonl").read_text().splitlines())
    shutil.copy(data / first, swapped / second)
    shutil.copy(data / second, swapped / first)
    base, other = judged(data, tmp_path / "base"), judged(swapped, tmp_path / "other")
    capsys.readouterr()
    out = tmp_path / "difference.json"
    assert main(["eval", "compare", *(str(tmp_path / name) for name in ("base", "other")), "-o", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["base"] == str(tmp_path / "base") and record["bar"] is None
    (part,) = record["others"][str(tmp_path / "other")].values()
    table = rows(capsys.readouterr().out)
    for question in QUESTIONS:
        difference, before, after = part["differences"][question], base["opening"][question], other["opening"][question]
        assert difference["base"] == pytest.approx(100 * before["share"], abs=0.01)
        assert difference["other"] == pytest.approx(100 * after["share"], abs=0.01)
        assert difference["points"] == pytest.approx(100 * (after["right"] - before["right"]) / 3, abs=1e-4)
        assert difference["num_videos"] == 3 and "within" not in difference
        name = "number" if question == "count" else question
        assert table[name][:3] == [
            f"{difference['base']:.1f}",
            f"{difference['other']:.1f}",
            f"{difference['points']:+.2f}",
        ]
    # the judge sees that the first two videos do not show their captions
    assert part["differences"]["shape"]["points"] + part["differences"]["color"]["points"] < -60


@pytest.mark.slow
def test_a_model_with_fewer_steps_is_compared_with_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, steps in (("four", "4"), ("again", "4"), ("one", "1")):
        options = ["--num", "2", "--seconds", "8", "--device", "cpu", "--steps", steps, "-o", str(tmp_path / name)]
        assert main(["eval", "shapeworld", *options]) == 0
    out = tmp_path / "difference.json"
    capsys.readouterr()
    others = [str(tmp_path / name) for name in ("again", "one")]
    assert main(["eval", "compare", str(tmp_path / "four"), *others, "--bar", "0", "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"against {tmp_path / 'four'}, percent right of 2 videos") == 2
    again, one = (json.loads(out.read_text())["others"][name] for name in others)
    headings = {"whole": "whole video", "first": "first 4 s", "last": "4 to 8 s"}
    assert {name: part["heading"] for name, part in again.items()} == headings
    for name in headings:
        for difference in again[name]["differences"].values():
            assert (difference["points"], difference["low"], difference["high"]) == (0, 0, 0)
            assert difference["within"]
        assert all(entry["within"] == (entry["points"] >= 0) for entry in one[name]["differences"].values())


def test_the_bar_is_a_column_and_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right, wrong = verdict(), verdict(["motion"])
    write(tmp_path / "base", [video(seed, [right]) for seed in range(4)])
    write(tmp_path / "worse", [video(0, [wrong]), *(video(seed, [right]) for seed in range(1, 4))])
    command = ["eval", "compare", str(tmp_path / "base"), str(tmp_path / "worse"), "-o", str(tmp_path / "x.json")]
    # d = -1, 0, 0, 0: mean -25 points, standard deviation 50
    for bar, answer in (("25", "yes"), ("24.9", "no")):
        assert main([*command, "--bar", bar]) == 0
        text = capsys.readouterr().out
        assert f"within {bar}" in text
        assert rows(text)["motion"] == ["100.0", "75.0", "-25.00", "-74.0", "to", "+24.0", "4", answer]
        assert rows(text)["color"] == ["100.0", "100.0", "+0.00", "0.0", "to", "0.0", "4", "yes"]
        record = json.loads((tmp_path / "x.json").read_text())
        assert record["bar"] == float(bar)
        differences = record["others"][str(tmp_path / "worse")]["first"]["differences"]
        assert differences["motion"] == {
            "num_videos": 4,
            "base": 100,
            "other": 75,
            "points": -25,
            "low": -74,
            "high": 24,
            "within": answer == "yes",
        }


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["base", "nowhere"], "cannot read the results.json of eval shapeworld nowhere"),
        (["empty", "base"], "cannot read the results.json of eval shapeworld empty/results.json"),
        (["base", "text.json"], "text.json is not JSON"),
        (
            ["base", "switches.json"],
            "switches.json is not a result of longvideo eval shapeworld: the file has no videos",
        ),
        (["base", "base", "longer"], "the number of frames of its video 1 is 192, not 96"),
        (["base", "base", "--bar", "-1"], "--bar -1 is not a number of points; use a number from 0 to 100"),
        (["base", "base", "--bar", "nan"], "--bar nan is not a number of points"),
        (["base", "base", "-o", "missing/x.json"], "missing is not a folder"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("base"), [video(0, [verdict()])])
    write(Path("longer"), [video(0, [verdict()] * 2)])
    Path("empty").mkdir()
    Path("text.json").write_text("shape: 95 %")
    Path("switches.json").write_text('{"keep": {"switches": []}}')
    assert main(["eval", "compare", *arguments]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.strip().splitlines()
    assert line.startswith("error: ") and named in line
    assert printed.out == ""
