"""Plans of a step on GPUs that are not here, against what was measured and what can be counted by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from longvideo.cli.main import main
from longvideo.config.loading import find_config, load_config
from longvideo.errors import ConfigError
from longvideo.train.clips.config import ClipTraining
from longvideo.train.clips.plan import Rates, plan_step
from longvideo.training.memory import GIB

MEASURED = ("stages=[{chunks: 12, batch: 1, steps: 1}]", "parallel.sequence=2")


def configuration(preset: str, *words: str) -> ClipTraining:
    return load_config(ClipTraining, [find_config(preset)], list(words))


def test_the_plan_of_a_measured_step() -> None:
    """Two H200 took 17.6 s at 371 TFLOP/s each, and the estimate of its run was 93.2 GiB."""
    config = configuration("wan/ar", *MEASURED)
    plan = plan_step(config, config.stages[0], 2)
    arithmetic, exchange, gradients = plan.seconds(Rates(371e12, 450e9, 50e9))
    assert arithmetic == pytest.approx(17.6, rel=0.01)
    assert plan.memory.total / GIB == pytest.approx(93.2, abs=0.1)
    tokens = 12 * 2 * 7040 / 2  # clean and noisy copies of half of the frames
    # q, k, v and the result; forward, again for the backward pass, and backward; half of each goes to the other rank
    assert plan.sequence_bytes == pytest.approx(4 * 3 * 30 * tokens * 3072 * 2 / 2)
    assert exchange == plan.sequence_bytes / 450e9
    assert plan.network_bytes == pytest.approx(2 * 5.0e9 * 2 / 2, rel=0.01) and gradients == plan.network_bytes / 50e9


@pytest.mark.parametrize(("zero_stage", "transfers"), [(0, 2), (1, 2), (2, 5), (3, 12)])
def test_gradients_and_weights_that_are_sent(zero_stage: int, transfers: int) -> None:
    config = configuration("wan/ar_64s", f"parallel.zero_stage={zero_stage}", "objective.compile=false")
    plan, alone = (plan_step(config, config.stages[0], gpus) for gpus in (8, 4))
    assert (plan.passes, alone.passes) == (4, 8)
    first = configuration("wan/ar_64s", "parallel.zero_stage=1")
    once = plan_step(first, first.stages[0], 8)
    assert plan.network_bytes / once.network_bytes == pytest.approx(transfers / 2)


def test_more_gpus_take_less_time_and_memory() -> None:
    config = configuration("wan/ar_64s", "parallel.sequence=8")
    plans = [plan_step(config, config.stages[0], gpus) for gpus in (8, 16, 32, 64)]
    assert [plan.passes for plan in plans] == [8, 4, 2, 1]
    operations = [plan.operations for plan in plans]
    assert operations == sorted(operations, reverse=True) and operations[0] == pytest.approx(8 * operations[3])
    assert [plan.memory.total for plan in plans] == sorted((plan.memory.total for plan in plans), reverse=True)


def test_a_window_needs_fewer_operations() -> None:
    config = configuration("wan/ar_64s")
    window = replace(config, objective=replace(config.objective, context="window"))
    assert plan_step(window, config.stages[0], 8).operations < 0.3 * plan_step(config, config.stages[0], 8).operations


def test_gpus_that_cannot_divide_the_work_are_refused() -> None:
    config = configuration("wan/ar_64s")
    with pytest.raises(ConfigError, match=r"6 GPUs do not divide into groups of parallel\.sequence=4"):
        plan_step(config, config.stages[0], 6)
    with pytest.raises(ConfigError, match="a batch of 8 does not divide into 16 replicas"):
        plan_step(config, config.stages[0], 64)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    words = ["bench", "plan", "wan/ar", *MEASURED, "--rate", "371", "--gpus", "2", "--output", str(file)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "93.2 GiB" in printed and "17.6 s" in printed and "estimated, not measured: 371 TFLOP/s" in printed
    record = json.loads(file.read_text())
    assert record["plans"][0]["gpus"] == 2 and record["plans"][0]["run_h"] < record["plans"][0]["step_s"]
    assert main(["bench", "plan", "wan/ar"]) != 0 and "--rate" in capsys.readouterr().err
