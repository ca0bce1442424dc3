"""`longvideo train`, from the configuration to a model folder, in seconds."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.latents import open_latents
from longvideo.cli.main import main
from tests.folders import file_names
from tests.train.small import Toy

RANDOM_CLIPS = ("clips", "preset=tiny", "data=null", "parallel.micro_batch=null", "--device", "cpu", "--dry-run", "1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    assert main(["train", "vae", "tiny/vae", *Toy.vae, "--out", str(folder / "vae"), "--device", "cpu"]) == 0
    return folder


def ar_arguments(folder: Path, name: str, *more: str) -> list[str]:
    vae = f"vae={folder / 'vae' / 'model'}"
    return ["train", "ar", "tiny/ar_opening", vae, *Toy.ar, *more, "--out", str(folder / name), "--device", "cpu"]


def test_autoencoder_run_leaves_a_model_with_latent_statistics(trained: Path) -> None:
    run = trained / "vae"
    config = ModelFolder.open(run / "model").vae_config
    assert len(config.latents_std) == 4 and min(config.latents_std) > 0
    assert any(mean != 0 for mean in config.latents_mean)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 4]
    assert {"psnr", "object", "kl"} <= lines[0].keys() and "val_object" in lines[-1]
    assert (run / "samples" / "vae_0000004.png").is_file()
    assert "base_dim: 8" in (run / "config.yaml").read_text()
    assert {"torch", "commit", "device"} <= json.loads((run / "environment.json").read_text()).keys()


def test_an_autoencoder_run_that_shows_no_clips_draws_nothing_and_measures_all(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "vae"
    assert main(["train", "vae", "tiny/vae", *Toy.vae, "validation.shown=0", "--out", str(out), "--device", "cpu"]) == 0
    assert not (out / "samples").exists()
    last, with_pictures = (
        json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in (out, trained / "vae")
    )
    assert last == with_pictures and last["val_psnr"] > 0


def test_transformer_run_stopped_and_resumed_gives_the_same_weights(trained: Path) -> None:
    assert main(ar_arguments(trained, "whole")) == 0
    assert (
        main(ar_arguments(trained, "cut", "stages=[{steps: 2, chunks: 1, batch: 3}]", "optimizer.schedule=constant"))
        == 0
    )
    assert main(ar_arguments(trained, "cut", "optimizer.schedule=constant")) == 0
    assert main(ar_arguments(trained, "constant", "optimizer.schedule=constant")) == 0
    weights = [
        load_file(trained / name / "checkpoints" / "step_0000004" / "weights_00000_00000.safetensors")
        for name in ("cut", "constant", "whole")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert not all(torch.equal(tensor, weights[2][name]) for name, tensor in weights[0].items())
    folder = ModelFolder.open(trained / "whole" / "model")
    assert folder.parts == ("transformer", "vae", "text_encoder")
    assert folder.load_transformer().patch_embedding.weight.dtype == torch.bfloat16
    samples = trained / "whole" / "samples"
    assert (samples / "ar_0000004.png").is_file()
    assert main(["decode", str(samples / "ar_0000004.latents.safetensors"), "-o", str(samples / "videos")]) == 0
    shown = open_latents(samples / "ar_0000004.latents.safetensors")
    assert shown.header.model == str(trained / "vae" / "model") and shown.num_videos == 1
    assert file_names(samples / "videos") == ["ar_0000004.mp4"]


def test_a_run_goes_on_from_another_runs_model(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ar_arguments(trained, "first", "export_dtype=fp32")) == 0
    initialize = f"initialize={trained / 'first' / 'model'}"
    one_small_step = ("stages=[{steps: 1, chunks: 3, batch: 2}]", "optimizer.learning_rate=1e-7")
    assert main(ar_arguments(trained, "second", initialize, *one_small_step, "export_dtype=fp32")) == 0
    models = [ModelFolder.open(trained / name / "model") for name in ("first", "second")]
    first, second = (model.load_transformer(dtype=torch.float32).state_dict() for model in models)
    change = max(float((second[name] - tensor).abs().max()) for name, tensor in first.items())
    assert 0 < change < 1e-6
    capsys.readouterr()
    assert main(ar_arguments(trained, "third", initialize, "model.num_layers=3")) == 2
    assert "model.num_layers is 3; expected 2, as the model in" in capsys.readouterr().err
    assert main(ar_arguments(trained, "fourth", initialize, "vae=tiny")) == 2
    assert "has 4 latent channels; expected 24, as the autoencoder in vae=tiny" in capsys.readouterr().err


@pytest.mark.slow
def test_training_in_four_bits_is_resumed_with_the_same_bits_and_validated(trained: Path) -> None:
    sizes = ("model.attention_head_dim=16", "model.ffn_dim=32", "validation={batches: 2, batch: 3, clips: 32}")
    more = (*sizes, "products.format=nvfp4", "optimizer.schedule=constant", "trainer.save_every=2")
    four, two = "stages=[{steps: 4, chunks: 1, batch: 3}]", "stages=[{steps: 2, chunks: 1, batch: 3}]"
    assert main(ar_arguments(trained, "fp4", *more, four)) == 0
    assert main(ar_arguments(trained, "fp4_cut", *more, two)) == 0
    shutil.copytree(trained / "fp4_cut", trained / "fp4_then_fp32")
    assert main(ar_arguments(trained, "fp4_cut", *more, four)) == 0
    # the last two steps round nothing, nor does validation then
    assert main(ar_arguments(trained, "fp4_then_fp32", *more, four, "products.format=bf16")) == 0
    assert main(ar_arguments(trained, "fp4_half", *more, four, "products.until=0.5")) == 0
    names = ("fp4", "fp4_cut", "fp4_then_fp32", "fp4_half")
    whole, cut, switched, half = (
        load_file(trained / name / "checkpoints" / "step_0000004" / "weights_00000_00000.safetensors") for name in names
    )
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())
    assert all(torch.equal(tensor, switched[name]) for name, tensor in half.items())
    assert not all(torch.equal(tensor, half[name]) for name, tensor in whole.items())
    losses = []
    for name in names:
        lines = [json.loads(line) for line in (trained / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["val_loss"] for line in lines if "val_loss" in line][-1])
    # after four steps the averages have hardly moved, so that both kinds may have the same loss
    assert losses[0] == losses[1] and losses[2] == losses[3]
    assert losses[0] == pytest.approx(losses[3], rel=0.2)


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["train", "vae", *Toy.vae, "--out", str(out), "--device", "cpu", "--dry-run", "1"]) == 0
    started, timed = capsys.readouterr().out.splitlines()
    assert started.startswith("training on cpu in fp32 | engine: one process | compiled: no (only on CUDA, not on cpu)")
    assert timed.startswith("stage 0 | 4 steps | first ")
    assert not out.exists()


@pytest.mark.parametrize("preset", ["wan/ar_nvfp4", "wan/ar_64s"])
def test_a_dry_run_takes_the_presets_in_nvfp4(preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("settings={height: 32, width: 64}", "stages=[{chunks: 2, batch: 2, steps: 1}]", "parallel.sequence=1")
    command = ["train", *RANDOM_CLIPS, preset, *sizes, "trainer.precision=fp32", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    started, timed = capsys.readouterr().out.splitlines()
    assert "NVFP4 for 100.0% of the multiply-adds (recipe best), emulated" in started
    assert timed.startswith("stage 0 | 1 steps | first ")


def test_train_ar_with_data_trains_clips_and_names_that_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one_step = ("data=null", "settings={height: 32, width: 64}", "stages=[{steps: 1, chunks: 1, batch: 1}]")
    small = ("preset=tiny", *one_step, "--dry-run", "1", "--device", "cpu", "--out", str(tmp_path / "run"))
    outputs = []
    for command in ("clips", "ar"):
        assert main(["train", command, *small]) == 0
        outputs.append(capsys.readouterr())
    assert [output.out.splitlines()[1].partition(" | first ")[0] for output in outputs] == ["stage 0 | 1 steps"] * 2
    assert "train clips" not in outputs[0].err
    assert outputs[1].err == "note: `longvideo train ar` with `data` runs `longvideo train clips`; use that\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vae", "optimzer.learning_rate=1"], "unknown key 'optimzer'; nearest is 'optimizer'"),
        (["vae", "tiny/vea"], "did you mean 'tiny/vae'?"),
        (["vae", "trainer.precision=fp8"], "trainer.precision is 'fp8'; expected one of 'auto', 'bf16', 'fp32'"),
        (["ar", "vae=nowhere"], "no model 'nowhere'"),
        (["vae", "--max-minutes", "0"], "--max-minutes is 0; expected a finite number above 0"),
        (["vae", "--dry-run", "0"], "--dry-run': Input should be greater than or equal to 1"),
        (["vae", "--trace"], "--trace lists the operations of a dry run; add --dry-run STEPS"),
        (["vae", "--resume", "maybe"], "'maybe' is not one of 'auto', 'never'"),
        (["clips", "tiny/ar"], "unknown key 'vae'"),
        (
            ["clips", "cpu/clips", "settings.chunk_frames=4"],
            "settings.chunk_frames is 4; expected 8, as the model in tiny; leave it out",
        ),
        (
            [*RANDOM_CLIPS, "settings={height: 32, width: 64, offset_per_shot: 1}", "stages=[{chunks: 1, batch: 2}]"],
            "every view has its own positions; use parallel.micro_batch=1",
        ),
        (["clips", "cpu/clips", "data=nowhere", "stages=[]"], "stages is empty; expected at least one stage"),
        (["vae", "scenes.height=100"], "scenes.height is 100; expected a multiple of 16"),
        (
            ["ar", "validation={batches: 1, clips: 7}", "bank.group=2"],
            "validation.clips is 7; expected a multiple of bank.group=2",
        ),
        (["vae", "--device", "abacus"], "'abacus' is not a device; use cpu, cuda or cuda:N"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *arguments, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_reports_to_wandb_where_it_is_disabled(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert main(ar_arguments(trained, "wandb", "trainer.wandb=longvideo-tests", "rollout.prompts=0")) == 0
    assert (trained / "wandb" / "wandb.id").is_file() and not (trained / "wandb" / "samples").exists()


@pytest.mark.parametrize(
    ("setting", "package", "extra"),
    [("trainer.tensorboard=true", "tensorboard", "train"), ("trainer.wandb=x", "wandb", "wandb")],
)
def test_a_missing_package_is_named_before_anything_is_loaded(
    setting: str, package: str, extra: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, package, None)  # Python treats it as a missing package
        assert main(["train", "vae", *Toy.vae, setting, "--out", str(tmp_path / "run"), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert f"{setting.partition('=')[0]} needs" in error and f"longvideo[{extra}]" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_stages_without_a_step_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        *Toy.vae,
        "stages=[{frames: 5, height: 32, width: 32, batch: 2, steps: 0}]",
        "--output",
        str(tmp_path / "run"),
        "--device",
        "cpu",
    ]
    assert main(["train", "vae", *arguments]) == 2
    assert "the stages have 0 steps in all; expected at least 1" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model").exists()


def test_a_model_that_no_earlier_run_made_is_the_packaged_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ("stages=[{steps: 2, chunks: 1, batch: 1}]", "scenes.count=4", "bank.clips=4", "bank.initial_clips=4")
    assert main(["train", "ar", *small, "bank.group=4", "--device", "cpu", "--dry-run", "1"]) == 0
    captured = capsys.readouterr().out
    first = "vae: runs/vae_refine/model does not exist; the packaged model tiny-teacher is used instead\n"
    assert captured.startswith(first)
    assert main(["train", "ar", "tiny/ar_opening", "vae=runs/vae_refine/model", "--device", "cpu"]) == 2
    assert "runs/vae_refine/model" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_cpu_sized_forms_in_the_help_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    vae = "stages=[{frames: 1, height: 64, width: 64, batch: 1, steps: 2}]"
    assert main(["train", "vae", "cpu/vae", vae, "--device", "cpu", "--out", "vae"]) == 0
    ar = ("stages=[{steps: 1, chunks: 1, batch: 1}]", "bank.clips=2", "bank.initial_clips=2", "rollout.prompts=0")
    assert main(["train", "ar", "cpu/ar", *ar, "--device", "cpu", "--out", "ar"]) == 0
    dmd = ("stages=[{frames: 8, batch: 1, steps: 2}]", "samples.prompts=0")
    assert main(["distill", "cpu/dmd", *dmd, "--device", "cpu", "--out", "dmd"]) == 0
    qad = ("stages=[{frames: 8, batch: 1, steps: 1}]", "samples.prompts=0", "qad.validation_batches=0")
    assert main(["distill", "cpu/qad", *qad, "--device", "cpu", "--out", "qad"]) == 0
    clips = ("stages=[{steps: 1, chunks: 1, batch: 1}]", "--dry-run", "1")
    assert main(["train", "clips", "cpu/clips", *clips, "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("model: ")] == [
        f"model: {name}/model" for name in ("vae", "ar", "dmd", "qad")
    ]
