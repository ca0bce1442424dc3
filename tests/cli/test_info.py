"""`longvideo info` prints the contents of a model, and ends with code 2 if its weights do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from longvideo.cli.main import main
from tests.checkpoint import small


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.save(tmp_path_factory.mktemp("models") / "small").path


def test_json_counts_parameters_and_works_out_the_geometry(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    counts = {part["name"]: part["num_parameters"] for part in report["parts"]}
    assert counts["transformer"] == sum(p.numel() for p in small.transformer().parameters())
    assert counts["vae"] == sum(p.numel() for p in small.vae().parameters())
    assert counts["text_encoder"] == sum(p.numel() for p in small.text_encoder().parameters())
    assert all(part["problem"] is None and part["dtypes"] == ["fp32"] for part in report["parts"])
    assert report["settings"]["steps"] == small.SETTINGS.steps
    geometry = report["geometry"]
    assert (geometry["latent_height"], geometry["latent_width"], geometry["tokens_per_chunk"]) == (4, 6, 48)
    assert (geometry["first_chunk_pixel_frames"], geometry["chunk_pixel_frames"]) == (29, 32)


def test_the_table_names_the_parts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(folder)]) == 0
    printed = capsys.readouterr().out
    for words in ("WanTransformer3DModel", "AutoencoderKLWan", "UMT5EncoderModel", "96 x 64 pixels", "8 steps", "fit"):
        assert words in printed


def test_weights_that_do_not_fit_end_with_code_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = (folder / "vae").glob("*.safetensors")
    tensors = load_file(file)
    save_file({**tensors, "surplus": torch.zeros(1)}, file)
    assert main(["info", str(folder)]) == 2
    captured = capsys.readouterr()
    assert "do not fit" in captured.out
    assert captured.err.startswith("error: ") and "1 unexpected: surplus" in captured.err
    assert captured.err.count("\n") == 1
