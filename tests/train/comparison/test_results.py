"""Losses of recipes against those of the first one."""

from __future__ import annotations

import pytest

from longvideo.evaluation.curves import RunMetrics
from longvideo.train.comparison.results import draw_losses, recipe_table, results_record, summarize


def metrics(losses: dict[int, float], *, quarter: float = 1.0, seconds: float = 0.5) -> RunMetrics:
    lines: list[dict[str, float]] = [
        {"step": step, "loss": 2 * loss, "seconds": seconds} for step, loss in losses.items()
    ]
    lines += [
        {"step": step, "val_loss": loss, "val_mse_0.25": quarter, "val_mse_1": 0.5} for step, loss in losses.items()
    ]
    return RunMetrics("seed_0", tuple(lines))


RUNS = {
    "bf16": {0: metrics({10: 1.5, 20: 1.0}), 1: metrics({10: 1.6, 20: 1.2})},
    "near": {0: metrics({10: 1.0, 20: 0.9}, quarter=1.1), 1: metrics({10: 1.3, 20: 1.2}, quarter=1.3, seconds=0.25)},
    "far": {0: metrics({10: 1.9, 20: 1.32}), 1: metrics({10: 1.9, 20: 1.32})},
}


def test_gaps_are_those_of_the_means_over_seeds() -> None:
    first, near, far = summarize(RUNS)
    assert (first.loss, first.spread) == (pytest.approx(1.1), pytest.approx(0.1 * 2**0.5))
    assert near.loss == pytest.approx(1.05) and near.by_quarter["val_mse_0.25"] == pytest.approx(1.2)
    record = results_record([first, near, far], {}, baseline="bf16")
    assert [own["gap_percent"] for own in record["recipes"]] == pytest.approx([0, -100 / 22, 20])
    assert [own["excess"] for own in record["recipes"]] == pytest.approx([0, -0.05, 0.22])
    assert record["recipes"][1]["excess_by_quarter"] == pytest.approx({"val_mse_0.25": 0.2, "val_mse_1": 0.0})


def test_the_first_step_with_the_loss_of_the_first_recipe_is_that_of_the_same_seed() -> None:
    first, near, far = summarize(RUNS)
    assert near.reached == {0: 10, 1: 20} and near.steps_to_baseline == 15
    assert first.steps_to_baseline == 20 and far.steps_to_baseline is None


def test_the_table_has_a_row_for_each_recipe_and_names_failed_runs() -> None:
    lines = recipe_table(summarize(RUNS), {"far, seed 2": "ended with code 1"}, baseline="bf16").splitlines()
    assert lines[0].startswith("| recipe | held-out loss | gap | excess | noise up to 0.25 | noise up to 0.5 |")
    assert lines[2] == "| bf16 | 1.1000 ± 0.1414 | +0.0% | +0.0000 | +0.0% |  |  | +0.0% | 20 | 0.500 |"
    assert lines[3] == "| near | 1.0500 ± 0.2121 | -4.5% | -0.0500 | +20.0% |  |  | +0.0% | 15 | 0.375 |"
    assert lines[4].startswith("| far | 1.3200 ± 0.0000 | +20.0% | +0.2200 |") and "|  | 0.500 |" in lines[4]
    assert lines[-1] == "failed: far, seed 2: ended with code 1"


def test_without_the_first_recipe_nothing_is_compared() -> None:
    runs = {"bf16": {}, "near": {0: metrics({20: 0.9})}}
    results = summarize(runs)
    assert "| near | 0.9000 |  |  |  |  |  |  |  | 0.500 |" in recipe_table(results, {}, baseline="bf16")
    assert results_record(results, {}, baseline="bf16")["recipes"][0]["gap_percent"] is None


def test_the_picture_has_a_curve_for_each_recipe() -> None:
    one = draw_losses({"bf16": RUNS["bf16"]})
    both = draw_losses(RUNS)
    assert one.size == both.size and one.getcolors(1 << 20) != both.getcolors(1 << 20)
