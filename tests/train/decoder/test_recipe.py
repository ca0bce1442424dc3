"""`longvideo train decoder`, from the configuration to a decoder file, in seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longvideo.checkpoint.decoders import open_decoder
from longvideo.checkpoint.folder import ModelFolder
from longvideo.cli.main import main
from longvideo.data.encoded import EncodedDataset
from longvideo.vae.tae import TinyDecoder
from tests.train.small import Toy


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model that has an autoencoder alone."""
    folder = tmp_path_factory.mktemp("runs")
    assert main(["train", "vae", "tiny/vae", *Toy.vae, "--out", str(folder / "vae"), "--device", "cpu"]) == 0
    return folder


def arguments(folder: Path, name: str, *more: str) -> list[str]:
    model = f"model={folder / 'vae' / 'model'}"
    return ["train", "decoder", model, *Toy.decoder, *more, "--out", str(folder / name), "--device", "cpu"]


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_a_decoder_a_table_and_a_picture(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(trained, "decoder")) == 0
    run, output = trained / "decoder", capsys.readouterr().out
    file = run / "model" / "decoder.safetensors"
    assert f"decoder: {file}" in output and f"--decoder {file}" in output
    assert "3 clips after step 4" in output and "full decoder from truth" in output
    assert (run / "samples" / "decoder_0000004.png").is_file()
    *steps, sample = metrics(run)
    assert [line["step"] for line in steps] == [2, 4] and {"loss", "psnr", "l1", "edge", "temporal"} <= steps[0].keys()
    for kind in ("val", "val_truth", "full_truth"):
        assert {f"{kind}_{name}" for name in ("psnr", "objects", "outlines", "background")} <= sample.keys()
    decoder = open_decoder(file, ModelFolder.open(trained / "vae" / "model").vae_config).load_decoder()
    assert isinstance(decoder, TinyDecoder) and decoder.config.decoder_widths == (8, 6, 4, 4)
    averages = load_file(run / "checkpoints" / "step_0000004" / "ema_00000_00000.safetensors")
    assert torch.equal(decoder.state_dict()["head.1.bias"], averages["student.head.1.bias/average"])


def test_a_run_that_was_stopped_resumes_with_the_same_losses(trained: Path) -> None:
    constant = "optimizer.schedule=constant"
    assert main(arguments(trained, "whole", constant)) == 0
    assert main(arguments(trained, "cut", constant, "stages=[{steps: 2, batch: 2, frames: 2}]")) == 0
    assert main(arguments(trained, "cut", constant)) == 0
    whole, cut = (metrics(trained / name) for name in ("whole", "cut"))
    for name in ("loss", "psnr", "grad"):
        assert cut[-2][name] == whole[-2][name]
    assert cut[-1] == whole[-1]


def test_a_run_starts_from_a_decoder_file(trained: Path) -> None:
    assert main(arguments(trained, "first")) == 0
    file = trained / "first" / "model" / "decoder.safetensors"
    still = "stages=[{steps: 1, batch: 2, frames: 2, learning_rate: 0}]"
    assert main(arguments(trained, "second", f"initialize={file}", still)) == 0
    first, second = (load_file(trained / name / "model" / "decoder.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_encoded_clips_are_trained_on_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "shapeworld", "--output", "footage", "--clips", "1", "--seconds", "2"]) == 0
    encode = ["data", "encode", "footage/manifest.jsonl", "--model", "tiny", "--chunks", "1", "--output", "clips"]
    assert main([*encode, "--device", "cpu"]) == 0
    dataset = EncodedDataset.open("clips")
    part = ("data=clips", "bank.height=64", "bank.width=96")
    words = ["train", "decoder", *Toy.decoder, *part, "--output", "run", "--device", "cpu"]
    assert main(words) == 0
    sample = metrics(Path("run"))[-1]
    assert {"val_psnr", "val_outlines", "val_flat"} <= sample.keys() and "val_truth_psnr" not in sample
    assert dataset.latent_size == (8, 14)
    capsys.readouterr()
    assert main([*words, "bank.width=100"]) == 2
    assert "bank.width is 100; expected a multiple of 16 of at most 224" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("widths=[8,8,8]", "widths is [8, 8, 8]; expected 4 numbers of channels"),
        ("parallel.sequence=2", "parallel.sequence is 2; expected 1"),
        ("stages=[{frames: 9}]", "a stage has frames=9; expected at most 6"),
        ("model=nowhere", "nowhere"),
    ],
)
def test_mistakes_are_one_line(trained: Path, setting: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(trained, "wrong", setting)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (trained / "wrong").exists()


def test_a_dry_run_writes_nothing(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(trained, "dry", "--dry-run", "1")) == 0
    _, bank, stage = capsys.readouterr().out.splitlines()
    assert bank.startswith("bank of 2 clips") and stage.startswith("stage 0 | 4 steps | first ")
    assert not (trained / "dry").exists()


@pytest.mark.slow
def test_two_ranks_train_as_one_process_does(trained: Path) -> None:
    pytest.importorskip("deepspeed")
    assert main(arguments(trained, "one")) == 0
    file = trained / "one" / "model" / "decoder.safetensors"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "longvideo"]
    subprocess.run([*launch, *arguments(trained, "two")], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for line, other in zip(metrics(trained / "one"), metrics(trained / "two"), strict=True):
        for name in {"loss", "grad", "psnr", "val_psnr"} & line.keys():
            assert line[name] == pytest.approx(other[name], rel=1e-4)
    more = (f"initialize={file}", "parallel.zero_stage=3")
    subprocess.run(
        [*launch, *arguments(trained, "three", *more)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert (trained / "three" / "model" / "decoder.safetensors").is_file()
