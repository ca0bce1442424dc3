"""`longvideo bench recipes`: runs of several recipes, each trained once, and their comparison."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.settings import ModelSettings
from longvideo.cli.main import main
from tests.train.small import Toy, small_autoencoder


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae") / "model"
    ModelFolder.save(folder, settings=ModelSettings(height=32, width=64), vae=small_autoencoder())
    return folder


def command(vae: Path, out: Path, *more: str) -> list[str]:
    sizes = ("stages=[{steps: 2, chunks: 1, batch: 2}]", "model.attention_head_dim=16", "rollout.prompts=0")
    held_out = "validation={batches: 1, batch: 4, clips: 8}"
    words = ["bench", "recipes", "tiny/ar_opening", f"vae={vae}", *Toy.ar, *sizes, held_out, *more]
    return [*words, "--output", str(out), "--device", "cpu", "--jobs", "2"]


def test_recipes_are_trained_once_and_compared(vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    vary = ["--vary", "bf16:", "--vary", "nvfp4:products.format=nvfp4"]
    assert main(command(vae, out, *vary)) == 0
    table = (out / "table.md").read_text()
    assert table in capsys.readouterr().out + "\n"
    assert table.splitlines()[2].startswith("| bf16 | ") and table.splitlines()[3].startswith("| nvfp4 | ")
    first, second = json.loads((out / "results.json").read_text())["recipes"]
    assert first["gap_percent"] == 0 and first["loss"] != second["loss"] and "0" in second["losses"]
    assert Image.open(out / "curves.png").size[0] > 100
    started = "NVFP4 for 100.0% of the multiply-adds"
    assert started in (out / "nvfp4" / "seed_0.log").read_text()
    assert started not in (out / "bf16" / "seed_0.log").read_text()
    written = {file: file.stat().st_mtime_ns for file in out.rglob("*.log")}
    # the same runs, and one that cannot train
    assert main(command(vae, out, *vary, "--vary", "te:products.format=nvfp4 products.backend=te")) == 1
    assert all(file.stat().st_mtime_ns == time for file, time in written.items())
    assert "failed: te, seed 0: ended with code 2: error: products: the backend te cannot" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--vary", "a:"], "a comparison needs at least two recipes"),
        (["--vary", "a:", "--vary", "b:products.format=fp4"], "products.format is 'fp4'; expected one of"),
        (["--vary", "a:", "--vary", "b:validation.batches=0"], "b computes no loss on held-out data"),
        (["--vary", "a:", "--vary", "b:stages[0].steps=3"], "b has 3 steps, and a has 2; use equal steps"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_it_trains(
    vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(command(vae, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_of_other_settings_is_refused(vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    vary = ["--vary", "a:", "--vary", "b:products.format=nvfp4"]
    arguments = command(vae, out)[2:-6]
    (out / "recipes.json").write_text(json.dumps({"arguments": arguments, "recipes": {"b": ["products.format=fp8"]}}))
    assert main(command(vae, out, *vary)) == 2
    assert "has runs of 'b' with ['products.format=fp8'], not ['products.format=nvfp4']" in capsys.readouterr().err
    (out / "recipes.json").write_text(json.dumps({"arguments": [], "recipes": {}}))
    assert main(command(vae, out, *vary)) == 2
    assert "compares [], not [" in capsys.readouterr().err
