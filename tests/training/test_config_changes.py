"""A run that is started again lists the settings that differ from those of its last start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from longvideo.config.loading import to_yaml
from longvideo.train.batch import ViewStage
from longvideo.train.clips.config import ClipTraining
from longvideo.training.config_changes import changes_line

CONFIG = ClipTraining(data="clips", stages=[ViewStage(steps=4), ViewStage(steps=6)])


def line(before: str, after: str, folder: Path) -> str | None:
    (folder / "config.yaml").write_text(before, encoding="utf-8")
    return changes_line(folder / "config.yaml", after)


def test_every_changed_value_is_listed_with_the_old_and_the_new_one(tmp_path: Path) -> None:
    rate = replace(CONFIG.optimizer, learning_rate=2e-5)
    stages = [ViewStage(steps=4), ViewStage(steps=9)]
    after = replace(CONFIG, seed=1, data="other clips", optimizer=rate, stages=stages)
    assert line(to_yaml(CONFIG), to_yaml(after), tmp_path) == (
        "the configuration changed since the run was last started: seed 0 -> 1, data clips -> other clips,"
        " stages[1].steps 6 -> 9, optimizer.learning_rate 1.0e-05 -> 2.0e-05"
    )


def test_nothing_is_said_of_an_equal_configuration_or_of_a_new_run(tmp_path: Path) -> None:
    assert line(to_yaml(CONFIG), to_yaml(CONFIG), tmp_path) is None
    assert changes_line(tmp_path / "nowhere.yaml", to_yaml(CONFIG)) is None


def test_keys_of_another_version_and_stages_of_another_number_are_listed(tmp_path: Path) -> None:
    text = line("seed: 0\nold: 3\nstages:\n- {steps: 1}\n", "seed: 0\nstages: []\n", tmp_path)
    assert text is not None and text.endswith(": old 3 -> (absent), stages [{steps: 1}] -> []")


def test_a_configuration_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for text in ("seed: [", "a: \xff"):
        (tmp_path / "config.yaml").write_bytes(text.encode("latin-1"))
        text = changes_line(tmp_path / "config.yaml", to_yaml(CONFIG))
        assert text is not None and f"{tmp_path / 'config.yaml'} cannot be read: " in text and "\n" not in text
