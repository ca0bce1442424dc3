"""Curves are drawn from metrics files, gaps are interpolated linearly, and other files are refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longvideo.cli.main import main
from longvideo.errors import UserError
from longvideo.evaluation.curves import RunMetrics, draw_curves, fill_gaps, read_metrics, round_range

FIRST = RunMetrics("one", ({"step": 10.0, "loss": 1.0}, {"step": 20.0, "loss": 0.5}, {"step": 20.0, "val": 3.0}))
SECOND = RunMetrics("two", ({"step": 10.0, "loss": 0.4}, {"step": 30.0, "loss": 0.2}))


def test_points_keep_the_steps_at_which_a_number_was_recorded() -> None:
    assert FIRST.names() == ["loss", "val"]
    assert FIRST.points("loss") == [(10.0, 1.0), (20.0, 0.5)]
    assert FIRST.points("val") == [(20.0, 3.0)]


def test_gaps_are_straight_lines_and_values_outside_are_nan() -> None:
    values = fill_gaps([(10, 1.0), (30, 2.0)], [0, 10, 20, 30, 40])
    assert values[1:4] == [1.0, 1.5, 2.0]
    assert math.isnan(values[0]) and math.isnan(values[4])


@pytest.mark.parametrize(
    ("values", "bounds"),
    [((0.02, 0.98), (0.0, 1.0)), ((7.5, 43.8), (0.0, 50.0)), ((0.3, 0.3), (0.3, 0.35)), ((-3, 12), (-5.0, 20.0))],
)
def test_the_axis_has_round_bounds_around_the_values(values: tuple[float, float], bounds: tuple[float, float]) -> None:
    low, high = round_range(*values)
    assert low <= values[0] and high >= values[1]
    assert (low, high) == pytest.approx(bounds)


def test_joined_runs_are_one_line_and_others_have_one_each() -> None:
    apart = np.asarray(draw_curves([FIRST, SECOND], ["loss"], title="t"))
    joined = np.asarray(draw_curves([FIRST, SECOND], ["loss"], title="t", join=True))
    red = (214, 39, 40)
    assert (apart == red).all(-1).any()
    assert not (joined == red).all(-1).any()


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="'los'; did you mean 'loss'"):
        draw_curves([FIRST, SECOND], ["los"], title="t")


def test_the_command_draws_and_does_not_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "vae"
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": 1 / s}) + "\n" for s in (1, 2, 4)))
    assert read_metrics(run / "metrics.jsonl").run == "vae"
    out = tmp_path / "pictures" / "loss.png"
    assert main(["eval", "curves", str(run / "metrics.jsonl"), "--out", str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.size == (760, 380)
    before = out.read_bytes()
    assert main(["eval", "curves", str(run / "metrics.jsonl"), "--metric", "loss", "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_bytes() == before


@pytest.mark.parametrize("text", ["", "step 1", "[1]", '{"loss": 1}'])
def test_another_kind_of_file_is_one_line_and_exit_2(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(text)
    assert main(["eval", "curves", str(file), "--out", str(tmp_path / "x.png")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and str(file) in lines[0]
    assert not (tmp_path / "x.png").exists()
