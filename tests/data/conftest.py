"""A small model, footage, and the footage as it is encoded."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint import small

from . import footage


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    small.save(folder)
    return folder


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return footage.footage(tmp_path_factory.mktemp("footage"))


@pytest.fixture(scope="module")
def encoded(manifest: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of two clips, written by one command."""
    out = tmp_path_factory.mktemp("encoded") / "clips"
    assert footage.encode(manifest, model, out, *footage.TWO_CLIPS) == 0
    return out
