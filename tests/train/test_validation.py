"""The loss on held-out views is that of one process, however many ranks compute it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.settings import ModelSettings
from longvideo.config.loading import find_config, load_config
from longvideo.distributed import Mesh, build_mesh
from longvideo.train.shapeworld.recipe import ArRecipe, ArTraining
from tests.training.processes import run_in_processes

from .small import CPU, Toy, small_autoencoder


def recipe(folder: Path, mesh: Mesh, *more: str) -> ArRecipe:
    views = ("stages=[{steps: 1, chunks: 2, batch: 4}]", "validation={batches: 2, batch: 4, clips: 8}")
    overrides = [f"vae={folder}", *Toy.ar, *views, f"parallel.sequence={mesh.sequence}", *more]
    built = ArRecipe(load_config(ArTraining, [find_config("tiny/ar_opening")], overrides), CPU, mesh)
    generator = torch.Generator().manual_seed(0)
    for parameter in built.transformer.parameters():  # fresh weights ignore the context
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return built


def losses(folder: Path, sequence: int, *more: str) -> dict[str, float]:
    """Return the losses that this rank reports. sequence: number of ranks that share the frames of a view."""
    mesh = Mesh() if sequence == 0 else build_mesh(sequence)
    return recipe(folder, mesh, *more).validate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae") / "model"
    ModelFolder.save(folder, settings=ModelSettings(height=32, width=64), vae=small_autoencoder())
    return folder


@pytest.mark.parametrize("sequence", [1, 2])
def test_two_ranks_report_the_loss_of_one_process(folder: Path, sequence: int) -> None:
    expected = losses(folder, 0)
    assert {"val_loss", "val_mse", "val_mse_0.25", "val_mse_1"} <= expected.keys()
    for reported in run_in_processes(2, losses, folder, sequence):
        assert reported == pytest.approx(expected, rel=1e-5)


def test_passes_do_not_change_the_loss_and_its_products_have_the_precision_of_training(folder: Path) -> None:
    expected = losses(folder, 0)
    assert losses(folder, 0, "parallel.micro_batch=1") == pytest.approx(expected, rel=1e-5)
    in_bf16 = losses(folder, 0, "trainer.precision=bf16")
    assert in_bf16 != expected and in_bf16 == pytest.approx(expected, rel=0.05)
