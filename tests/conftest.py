"""Set the process up before anything heavy is imported: threads, the Triton interpreter, marks that need a GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if "PYTEST_XDIST_WORKER" in os.environ:
    # each worker has one core; more threads than cores slow all of them down
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from tests.options import OPTIONS

if TYPE_CHECKING:
    from longvideo.infer.pipeline import StreamingPipeline

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
if not torch.cuda.is_available():
    # read when a kernel is defined, so it has to be set before any module with kernels is imported
    os.environ["TRITON_INTERPRET"] = "1"

BLACKWELL = (10, 0)
BASE_SECONDS = 600  # as `timeout` in pyproject.toml


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("longvideo")
    for option in OPTIONS:
        group.addoption(
            option.name,
            metavar=option.metavar,
            type=option.kind,
            default=option.default,
            help=option.help if option.default is None else f"{option.help} Default: {option.default:g}.",
        )


@pytest.fixture
def picture_folder(request: pytest.FixtureRequest) -> Path:
    """Return the folder of `--write-pictures`; without it, the tests that draw pictures are skipped."""
    folder = request.config.getoption("--write-pictures")
    if folder is None:
        pytest.skip("writes pictures for the documentation; use --write-pictures FOLDER")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small model folder with random weights; tests that damage it copy it first."""
    # imported here: after the environment is set, and only for tests that need it
    from tests.infer import small

    folder = tmp_path_factory.mktemp("model") / "small"
    small.save(folder)
    return folder


@pytest.fixture(scope="session")
def pipeline(model_folder: Path) -> StreamingPipeline:
    from longvideo.infer.pipeline import StreamingPipeline

    return StreamingPipeline.from_pretrained(model_folder, device="cpu", dtype=torch.float32)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = missing_devices()
    for item in items:
        for mark, reason in missing.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))
        if limit := item.get_closest_marker("time_limit"):
            option, seconds = limit.args
            item.add_marker(pytest.mark.timeout(BASE_SECONDS + seconds * config.getoption(option)))


def missing_devices() -> dict[str, str]:
    """Return the reason for each device mark whose tests cannot run here."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    capability = torch.cuda.get_device_capability() if count else None
    reasons = {}
    if count < 1:
        reasons["gpu"] = "needs a CUDA GPU; this machine has none"
    if count < 2:
        reasons["multigpu"] = f"needs two CUDA GPUs; this machine has {count}"
    if capability is None or capability < BLACKWELL:
        here = f"its GPU has {capability[0]}.{capability[1]}" if capability else "this machine has no GPU"
        reasons["sm100"] = f"needs a GPU of compute capability 10.0 or newer; {here}"
    return reasons
