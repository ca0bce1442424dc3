"""The collector runs again after modules were imported, whatever happens, and does not examine what they created."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest

from longvideo.machine.preloading import preload

MODULE = "import gc\nassert not gc.isenabled()\nCREATED = [[number] for number in range(1000)]\n"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "preloaded_for_a_test.py").write_text(MODULE)
    (tmp_path / "broken_for_a_test.py").write_text("raise RuntimeError('broken')\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "preloaded_for_a_test"


def test_objects_of_preloaded_modules_are_not_examined(module: str) -> None:
    before = gc.get_freeze_count()
    preload(module)
    try:
        assert gc.isenabled() and gc.get_freeze_count() >= before + 1000
        assert not any(one is sys.modules[module].CREATED for one in gc.get_objects())
    finally:
        gc.unfreeze()
        del sys.modules[module]


def test_imported_modules_change_nothing() -> None:
    before = gc.get_freeze_count()
    preload("json", "pathlib")
    assert gc.get_freeze_count() == before


def test_the_collector_runs_after_an_import_that_failed(module: str) -> None:
    del module
    with pytest.raises(RuntimeError, match="broken"):
        preload("broken_for_a_test")
    assert gc.isenabled()
