"""A distillation that the tests of `longvideo distill` and `longvideo merge` share."""

from __future__ import annotations

from pathlib import Path

import pytest

from longvideo.cli.main import main
from tests.checkpoint import small
from tests.cli.distillation import PROMPTS, arguments


@pytest.fixture(scope="session")
def distill_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a small random model and a file of prompts, in which the tests write runs."""
    folder = tmp_path_factory.mktemp("distill")
    small.save(folder / "model")
    (folder / "prompts.txt").write_text(PROMPTS)
    return folder


@pytest.fixture(scope="session")
def distill_run(distill_folder: Path) -> Path:
    """Return the folder of a finished run."""
    assert main(arguments(distill_folder, "run")) == 0
    return distill_folder / "run"
