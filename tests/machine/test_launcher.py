"""The rank of a process is read from the variables that launchers set."""

from __future__ import annotations

import pytest

from longvideo.errors import UserError
from longvideo.machine.launcher import ProcessRank, is_main_process, launched, process_rank


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_a_process_without_a_launcher_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not launched() and process_rank() == ProcessRank(0, 1, 0, 1)
    monkeypatch.setenv("WORLD_SIZE", "4")  # which some schedulers set without a rank
    assert not launched() and process_rank() == ProcessRank() and is_main_process()


def test_a_launched_process_has_the_numbers_of_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert launched() and process_rank() == ProcessRank(5, 8, 1, 4) and not is_main_process()


def test_a_variable_that_is_not_a_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "first")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="RANK is 'first'; expected a whole number"):
        process_rank()
