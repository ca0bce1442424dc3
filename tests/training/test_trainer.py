"""The trainer over a problem of 36 parameters: what a run keeps, and what it survives."""

from __future__ import annotations

import itertools
import json
import math
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longvideo.errors import ConfigError, UserError
from longvideo.files import WriteError, write_text
from longvideo.training.checkpoint import layout
from longvideo.training.ema import ExponentialMovingAverage
from longvideo.training.engine import LocalEngine
from longvideo.training.optimizer import OptimizerConfig, RateSegment, decay_onset, rate_schedule
from longvideo.training.run_folder import write_record
from longvideo.training.run_log import RunLog
from longvideo.training.stopping import RunStopped
from longvideo.training.trainer import Diverged, Ending, Trainer
from longvideo.training.window import Window
from tests.files.test_writing import no_file_longer_than

from .toy import toy_trainer


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    engine = trainer.engine
    assert isinstance(engine, LocalEngine)
    return {name: engine.whole(*name.rsplit("/", 1)).detach().clone() for name in layout(engine.shapes())}


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_resumed_run_equals_uninterrupted_run_bit_for_bit(tmp_path: Path) -> None:
    whole = toy_trainer(tmp_path / "whole", 40)
    assert whole.run()
    # stopped in mid-run: the checkpoint of step 20 is the newest when the second process starts
    first = toy_trainer(tmp_path / "cut", 40)
    window = Window(first.device)
    for step in range(20):
        first.one_step(step, window)
    first.save(20)
    second = toy_trainer(tmp_path / "cut", 40)
    assert second.run(resume="auto")
    assert_same_bits(state_of(whole), state_of(second))
    assert_same_bits(*(load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut")))


def test_loss_falls_thirtyfold(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, 150)
    trainer.run()
    losses = [record["loss"] for record in records(tmp_path) if "loss" in record]
    assert losses[-1] < losses[0] / 30


def test_run_stops_at_the_deadline_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr("longvideo.training.trainer.time.monotonic", lambda: float(next(clock)))
    stopped = toy_trainer(tmp_path, 20)
    assert not stopped.run(deadline=8.0)
    assert (tmp_path / "model").is_dir()
    assert len(stopped.checkpoints.steps()) == 1 and 0 < stopped.checkpoints.steps()[0] < 8
    monkeypatch.undo()
    again = toy_trainer(tmp_path, 20)
    assert again.run(resume="auto")
    assert again.checkpoints.steps()[-2:] == [10, 20]


def test_a_run_without_time_for_a_step_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="before its first step.*raise --max-minutes"):
        toy_trainer(tmp_path, 20).run(deadline=-math.inf)
    assert not (tmp_path / "model").exists()
    toy_trainer(tmp_path, 20).run()
    assert toy_trainer(tmp_path, 20).run(deadline=-math.inf)


def test_checkpoint_stands_where_a_segment_begins(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, 3, 0, 5, save_every=0, keep_checkpoints=9)
    trainer.run()
    assert trainer.checkpoints.steps() == [3, 8]


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, 40, keep_checkpoints=3)
    trainer.run()
    assert trainer.checkpoints.steps() == [20, 30, 40]


def test_resume_never_refuses_a_used_folder(tmp_path: Path) -> None:
    toy_trainer(tmp_path, 10).run()
    with pytest.raises(ConfigError, match="already holds a run"):
        toy_trainer(tmp_path, 10).run(resume="never")


def test_step_without_finite_gradient_changes_nothing(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, 10, bad_steps=frozenset({3}))
    window = Window(trainer.device)
    for step in range(3):
        trainer.one_step(step, window)
    before = {name: value for name, value in state_of(trainer).items() if not name.endswith("/average")}
    trainer.one_step(3, window)
    after = {name: value for name, value in state_of(trainer).items() if not name.endswith("/average")}
    assert_same_bits(before, after)
    assert trainer.engine.num_skipped() == 1
    trainer.one_step(4, window)
    assert not torch.equal(before["linear.weight/weight"], state_of(trainer)["linear.weight/weight"])


def test_run_that_never_recovers_raises(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, 40, bad_steps=frozenset(range(5, 40)), max_skipped_steps=12)
    with pytest.raises(Diverged, match="15 steps up to step 20"):
        trainer.run()


def test_a_short_run_whose_steps_are_mostly_not_finite_raises_and_exports_nothing(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"9 steps up to step 10 .* \(90% of them, allowed: 50%\)"):
        toy_trainer(tmp_path, 10, bad_steps=frozenset(range(1, 10)), max_skipped_steps=50).run()
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(("total_steps", "every"), [(10, {"save_every": 10}), (400, {"sample_every": 10})])
def test_steps_that_were_mostly_skipped_are_neither_saved_nor_exported_by_any_start(
    tmp_path: Path, total_steps: int, every: dict[str, int]
) -> None:
    settings = {"log_every": 500, "save_every": 0} | every
    for _ in range(2):
        trainer = toy_trainer(tmp_path, total_steps, bad_steps=frozenset(range(1, 400)), **settings)
        with pytest.raises(Diverged, match=r"9 steps up to step 10 .*; start again with a lower learning rate$"):
            trainer.run()
    assert trainer.checkpoints.steps() == [] and trainer.exported_step() == -1
    assert not (tmp_path / "model").exists()


def test_a_signal_before_the_first_step_saves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = toy_trainer(tmp_path, 4)
    trainer.ending = lambda _deadline, _signals: Ending(signal.SIGTERM, 0)  # type: ignore[method-assign]
    with pytest.raises(RunStopped):
        trainer.run()
    assert "stopped by SIGTERM at step 0 of 4, nothing to save\n" in capsys.readouterr().out
    assert trainer.checkpoints.steps() == []


def test_a_signal_does_not_save_steps_that_were_mostly_skipped(tmp_path: Path) -> None:
    assert toy_trainer(tmp_path, 4).run()
    trainer = toy_trainer(tmp_path, 40, bad_steps=frozenset(range(4, 40)), save_every=0)
    one_step = trainer.one_step

    def stopped(step: int, window: Window) -> None:
        one_step(step, window)
        if step == 9:
            signal.raise_signal(signal.SIGTERM)

    trainer.one_step = stopped  # type: ignore[method-assign]
    with pytest.raises(Diverged, match=r"6 steps up to step 10 .*; resume from the last checkpoint with a lower"):
        trainer.run()
    assert trainer.checkpoints.steps() == [4]


def test_a_checkpoint_of_steps_that_were_mostly_skipped_is_not_exported(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, 10)
    trainer.engine.put_counts(trainer.engine.counts() | {"skipped": 9})
    trainer.checkpoints.save(10, trainer.engine, {})
    with pytest.raises(Diverged, match=r"9 steps up to step 10 .*; start again .* and another --output$"):
        toy_trainer(tmp_path, 10).run()
    assert not (tmp_path / "model").exists()


def test_weights_without_a_finite_validation_loss_are_not_exported(tmp_path: Path) -> None:
    for _ in range(2):
        trainer = toy_trainer(tmp_path, 10)
        trainer.recipe.validate = lambda: {"val_loss": math.nan}  # type: ignore[method-assign]
        with pytest.raises(Diverged, match="val_loss is nan after step 10, and the model is not written; start again"):
            trainer.run()
        assert not (tmp_path / "model").exists()


def test_a_long_run_is_judged_by_its_share_after_twenty_steps(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="15 steps up to step 20"):
        toy_trainer(tmp_path, 400, bad_steps=frozenset(range(5, 20)), max_skipped_steps=50).run()
    assert toy_trainer(tmp_path / "half", 20, bad_steps=frozenset(range(10, 20)), max_skipped_steps=50).run()


def test_weights_that_are_not_finite_replace_neither_checkpoint_nor_model(tmp_path: Path) -> None:
    assert toy_trainer(tmp_path, 10).run()
    model = (tmp_path / "model" / "model.safetensors").read_bytes()
    trainer = toy_trainer(tmp_path, 20)
    one_step = trainer.one_step

    def breaking(step: int, window: Window) -> None:
        one_step(step, window)
        with torch.no_grad():
            next(trainer.recipe.objective.parameters())[0, 0] = math.inf

    trainer.one_step = breaking  # type: ignore[method-assign]
    with pytest.raises(Diverged, match="weights are not finite after step 20"):
        trainer.run()
    assert toy_trainer(tmp_path, 20).checkpoints.steps() == [10]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == model


def test_a_run_stopped_before_its_export_exports_when_it_is_started_again(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, 10)
    window = Window(trainer.device)
    for step in range(10):
        trainer.one_step(step, window)
    trainer.sample(5, RunLog(tmp_path))
    trainer.save(10)
    assert trainer.exported_step() == 5
    again = toy_trainer(tmp_path, 10)
    assert again.run() and again.exported_step() == 10


def test_a_finished_run_exports_again_only_after_its_configuration_changed(tmp_path: Path) -> None:
    for config, exports in (("seed: 0", 1), ("seed: 0", 0), ("seed: 1", 1), ("seed: 1", 0)):
        trainer = toy_trainer(tmp_path, 10)
        export, configs = trainer.recipe.export, []

        def record(folder: Path, export: Callable[[Path], None] = export, configs: list[str] = configs) -> None:
            configs.append((tmp_path / "config.yaml").read_text())
            export(folder)

        trainer.recipe.export = record  # type: ignore[method-assign]
        assert trainer.run(config_text=config)
        assert configs == [config] * exports and trainer.exported_step() == 10


def test_a_start_killed_before_its_export_with_new_settings_leaves_it_to_the_next(tmp_path: Path) -> None:
    assert toy_trainer(tmp_path, 10).run(config_text="seed: 0")
    assert write_record(tmp_path, "seed: 1", torch.device("cpu")) is not None
    trainer = toy_trainer(tmp_path, 10)
    assert trainer.exported_step() == -1
    assert trainer.run(config_text="seed: 1") and trainer.exported_step() == 10


def test_a_full_disk_during_an_export_names_the_checkpoint_that_stays(tmp_path: Path) -> None:
    for steps, left in ((0, "no checkpoint is left"), (10, "the newest whole checkpoint is step_0000010")):
        trainer = toy_trainer(tmp_path, 10)
        if steps:
            trainer.save(steps)
        trainer.recipe.export = lambda folder: write_text(folder, "x" * 2000)  # type: ignore[method-assign]
        with no_file_longer_than(1000), pytest.raises(WriteError) as caught:
            trainer.sample(10, RunLog(tmp_path, enabled=False))
        message = f"cannot write {tmp_path / 'model'}: file too large; no part of it remains"
        assert str(caught.value) == f"{message}; {left}"
        assert not (tmp_path / "model").exists() and trainer.exported_step() == -1


def test_without_a_gradient_clip_nothing_is_clipped(tmp_path: Path) -> None:
    engine = toy_trainer(tmp_path, 1).engine
    assert isinstance(engine, LocalEngine)
    for parameter in engine.parameters:
        parameter.grad = torch.full_like(parameter, 100.0)
    engine.gradient_clip = 0.0
    assert float(engine.clip()) == pytest.approx(600.0)
    assert all(float(p.grad.max()) == 100.0 for p in engine.parameters if p.grad is not None)
    engine.gradient_clip = 6.0
    engine.clip()
    assert all(float(p.grad.max()) == pytest.approx(1.0, rel=1e-5) for p in engine.parameters if p.grad is not None)


def test_a_rate_of_zero_freezes_a_segment() -> None:
    rate = rate_schedule(OptimizerConfig(warmup_steps=0), [RateSegment(2), RateSegment(2, 0.0)])
    assert rate(1) > 0 and rate(2) == rate(3) == 0.0


def test_average_equals_its_definition() -> None:
    weight = torch.nn.Parameter(torch.zeros(5))
    average = ExponentialMovingAverage({"weight": weight}, decay=0.7)
    expected = torch.zeros(5, dtype=torch.float64)
    for step in range(50):
        with torch.no_grad():
            weight += torch.randn(5, generator=torch.Generator().manual_seed(step))
        decay = min(0.7, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach().double()
        average.update(step)
    torch.testing.assert_close(average.average["weight"].double(), expected, rtol=1e-6, atol=1e-6)
    trained, averaged = weight.detach().clone(), average.average["weight"].clone()
    with average.applied():
        assert torch.equal(weight, averaged)
    assert torch.equal(weight, trained)


def test_before_its_start_the_average_is_the_weights() -> None:
    weight = torch.nn.Parameter(torch.zeros(5))
    late = ExponentialMovingAverage({"weight": weight}, decay=0.7, start=3)
    early = ExponentialMovingAverage({"weight": weight}, decay=0.7)
    for step in range(6):
        with torch.no_grad():
            weight += torch.randn(5, generator=torch.Generator().manual_seed(step))
        late.update(step)
        if step < 3:
            assert torch.equal(late.average["weight"], weight)
            early.average["weight"].copy_(weight)
        else:
            early.update(step - 3)
            assert torch.equal(late.average["weight"], early.average["weight"])
    assert not torch.equal(late.average["weight"], weight)


def test_metrics_are_weighted_means_over_the_window(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, 5)
    trainer.run()
    logged = records(tmp_path)[0]
    assert logged["step"] == 5
    assert logged["weighted"] == pytest.approx(logged["loss"] / 2, rel=1e-5)
    assert logged["worst"] > logged["loss"]


def test_step_line_reads_as_documented(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy_trainer(tmp_path, 5).run()
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("step"))
    pattern = (
        r"step 5/5 \| loss \d+\.\d{4} \| grad \d+\.\d\d \| lr \d\.\de-\d\d \| [\d.]+ m?s"
        r" \| [\d.]+[kMG]? row/s \| [\d.]+ GiB \| eta 0m00s \| worst"
    )
    assert re.match(pattern, line), line


def test_learning_rate_warms_up_and_follows_its_segments() -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule="cosine", warmup_steps=10, final_fraction=0.1)
    rate = rate_schedule(config, [RateSegment(50), RateSegment(50, 0.5)])
    assert rate(0) == pytest.approx(0.1)
    assert rate(9) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.09)))
    assert rate(50) == pytest.approx(0.5 * 0.55)
    assert rate(100) == pytest.approx(0.5 * 0.1)
    constant = rate_schedule(OptimizerConfig(learning_rate=1.0, schedule="constant", warmup_steps=0), [RateSegment(9)])
    assert {constant(step) for step in range(9)} == {1.0}


def test_wsd_is_constant_and_then_falls_in_a_line_over_all_segments() -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule="wsd", warmup_steps=4, decay_fraction=0.25, final_fraction=0.2)
    rate = rate_schedule(config, [RateSegment(20), RateSegment(20, 0.5)])
    assert decay_onset(config, 40) == 30
    assert rate(1) == 0.5 and {rate(step) for step in range(3, 20)} == {1.0}
    assert {rate(step) for step in range(20, 31)} == {0.5}
    assert rate(35) == pytest.approx(0.5 * 0.6)
    assert rate(40) == rate(50) == pytest.approx(0.5 * 0.2)
    without = OptimizerConfig(learning_rate=1.0, schedule="wsd", warmup_steps=0, decay_fraction=0)
    assert {rate_schedule(without, [RateSegment(9)])(step) for step in range(9)} == {1.0}


def test_a_step_whose_loss_leaps_changes_nothing(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, 40, bad_steps=frozenset({30}), bad_factor=100.0, spike_factor=5.0)
    window = Window(trainer.device)
    for step in range(30):
        trainer.one_step(step, window)
    before = state_of(trainer)
    trainer.one_step(30, window)
    after = state_of(trainer)
    assert all(torch.equal(value, after[name]) for name, value in before.items() if not name.endswith("/average"))
    assert trainer.engine.num_skipped() == 1
    mean = trainer.engine.counts()["loss_mean"]
    trainer.one_step(31, window)
    assert trainer.engine.num_skipped() == 1 and 0 < trainer.engine.counts()["loss_mean"] < 2 * mean


def test_without_a_factor_every_finite_loss_counts(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, 40, bad_steps=frozenset({30}), bad_factor=100.0)
    for step in range(32):
        trainer.one_step(step, Window(trainer.device))
    assert trainer.engine.num_skipped() == 0


def test_wandb_gets_every_number_and_one_run_for_a_run_that_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # an earlier test of this process may have started it in another mode
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}.items():
        monkeypatch.setenv(name, value)
    for until in (2, 4):
        log = RunLog(tmp_path, wandb="longvideo-tests", start_step=until - 2)
        for step in (until - 1, until):
            log.record({"step": step, "loss": 0.125 * step, "val_object": 31.0})
        log.close()
    wandb.teardown()  # the process of wandb writes the last records of a file as it ends
    records = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(records) == 2 and len({record.stem.removeprefix("run-") for record in records}) == 1
    for record in records:
        assert {b"loss", b"val_object"} <= {name for name in (b"loss", b"val_object") if name in record.read_bytes()}
