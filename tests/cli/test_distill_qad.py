"""`longvideo distill` with `method: qad` on a small random model: its run folder, resumed runs, and bad settings."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from longvideo.checkpoint.folder import ModelFolder
from longvideo.cli.main import main
from longvideo.config.loading import find_config, load_config
from longvideo.distill.config import Distillation
from longvideo.distill.qad_recipe import QadRecipe
from longvideo.distill.roles import Role
from longvideo.distill.walk import Walk
from longvideo.quantization.convert import with_precision
from tests.checkpoint import small
from tests.cli.distillation import PROMPTS

CPU = torch.device("cpu")
TRANSFORMER = replace(small.TRANSFORMER, attention_head_dim=16)
SMALL = (
    "optimizer.learning_rate=1e-3",
    "optimizer.schedule=constant",
    "optimizer.warmup_steps=0",
    "trainer.log_every=1",
    "trainer.sample_every=0",
    "trainer.save_every=0",
    "shapeworld.cut_fraction=0",
    "samples.prompts=1",
    "samples.chunks=2",
    "samples.steps=[2]",
    "samples.judge=false",
)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model whose layers can be packed, and a file of prompts."""
    folder = tmp_path_factory.mktemp("qad")
    config, small.TRANSFORMER = small.TRANSFORMER, TRANSFORMER
    try:
        small.save(folder / "model", replace(small.SETTINGS, steps=2))
    finally:
        small.TRANSFORMER = config
    (folder / "prompts.txt").write_text(PROMPTS)
    return folder


def settings(home: Path, *more: str, steps: int = 2) -> list[str]:
    own = [f"model={home / 'model'}", f"prompts={home / 'prompts.txt'}"]
    return [*own, *SMALL, f"stages=[{{frames: 16, batch: 2, steps: {steps}}}]", *more]


def arguments(home: Path, name: str, *more: str, steps: int = 2) -> list[str]:
    return ["distill", "tiny/qad", *settings(home, *more, steps=steps), "--out", str(home / name), "--device", "cpu"]


def recipe(home: Path, *more: str) -> QadRecipe:
    return QadRecipe(load_config(Distillation, [find_config("tiny/qad")], settings(home, *more)), CPU)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def run(home: Path) -> Path:
    assert main(arguments(home, "run", "merge=true")) == 0
    return home / "run"


def test_a_run_leaves_a_model_in_4_bits_and_its_weights_in_bf16(run: Path, home: Path) -> None:
    steps = [line for line in lines(run) if "loss" in line]
    assert len(steps) == 2 and all(line["loss"] > 0 and 0 < line["qad_relative"] < 1 for line in steps)
    (sample,) = [line for line in lines(run) if "val_loss" in line]
    assert sample["val_loss"] > 0
    packed, whole = ModelFolder.open(run / "model"), ModelFolder.open(run / "model_bf16")
    assert packed.is_packed and not whole.is_packed
    source = ModelFolder.open(home / "model")
    assert asdict(packed.settings) == asdict(whole.settings) == asdict(source.settings)
    record = json.loads((run / "model" / "distillation.json").read_text())
    assert record["method"] == "qad" and record["trained"] == "weights" and record["kv_cache"] == "nvfp4"
    assert (run / "samples" / "student_0000002_2_steps.png").is_file()
    # the packed model is what `longvideo quantize` makes of the one in bf16
    assert main(["quantize", str(run / "model_bf16"), str(home / "quantized")]) == 0
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert (home / "quantized" / name).read_bytes() == (run / "model" / name).read_bytes()


def test_the_exported_model_computes_what_the_student_computes(home: Path, tmp_path: Path) -> None:
    """Chunk after chunk with its cache, bit for bit: on a CPU both run the same operations."""
    own = recipe(home)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in own.networks.trained(Role.STUDENT).values():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    own.networks.pack()
    own.export(tmp_path / "model")
    folder = ModelFolder.open(tmp_path / "model")
    exported = with_precision(folder.load_transformer(dtype=torch.float32), "nvfp4", packed=True)
    source = ModelFolder.open(home / "model").load_transformer(dtype=torch.bfloat16).float()
    (share,) = {id(part.clip): part.clip for part in own.source.shares(0, own.mesh, None)}.values()
    velocities: dict[str, list[Tensor]] = {}
    for name, network in (("student", own.student), ("exported", exported), ("source", source)):
        walk = Walk(network, share, own.spec, own.networks.new_cache(Role.STUDENT, share.batch))
        velocities[name] = []
        for index in range(share.num_chunks):
            noise = own.objective.rollouts.noise(share, index, "compared")
            with torch.no_grad():
                velocities[name].append(walk.velocity(noise, torch.full((share.batch, 8), 0.7)))
            if index + 1 < share.num_chunks:
                walk.finish(noise, torch.zeros(share.batch, 8))
    for student, same, other in zip(*velocities.values(), strict=True):
        assert torch.equal(student, same) and not torch.equal(student, other)


def test_generate_and_a_second_run_take_the_exported_model(
    run: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = ["generate", "a ball", "--seconds", "1", "--kv-cache", "nvfp4", "--device", "cpu"]
    assert main([*video, "--model", str(run / "model"), "-o", str(home / "ball.mp4")]) == 0
    packed = (f"model={run / 'model'}", f"teacher={run / 'model_bf16'}", "qad.train=lora", "lora.rank=4")
    assert main(arguments(home, "second", *packed, "samples.prompts=0", steps=1)) == 0
    capsys.readouterr()


def test_an_adapter_is_trained_next_to_packed_weights(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(home, "lora", "qad.train=lora", "lora.rank=4", "merge=true")) == 0
    out = capsys.readouterr().out
    assert f"--adapter {home / 'lora' / 'lora'}" in out and "--kv-cache nvfp4" in out
    folder = ModelFolder.open(home / "lora" / "model")
    assert folder.is_packed and not ModelFolder.open(home / "lora" / "model_bf16").is_packed
    video = ["generate", "a ball", "--seconds", "1", "--device", "cpu", "--adapter", str(home / "lora" / "lora")]
    assert main([*video, "--model", str(folder.path), "-o", str(home / "adapted.mp4")]) == 0


def state(run: Path) -> dict[str, Tensor]:
    place = run / "checkpoints" / "step_0000004"
    return {name: tensor for path in place.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("train", ["weights", "lora"])
def test_a_resumed_run_has_the_bits_of_a_whole_one(home: Path, train: str) -> None:
    """Stopped after its export, which puts averaged weights in place, and resumed for two more steps."""
    more = (f"qad.train={train}", "qad.guidance=2", "samples.prompts=0", "trainer.keep_checkpoints=9")
    more = (*more, "lora.rank=4") if train == "lora" else more
    assert main(arguments(home, f"whole_{train}", *more, steps=4)) == 0
    assert main(arguments(home, f"parts_{train}", *more, "trainer.sample_every=1", steps=2)) == 0
    assert main(arguments(home, f"parts_{train}", *more, steps=4)) == 0
    whole, parts = state(home / f"whole_{train}"), state(home / f"parts_{train}")
    assert whole.keys() == parts.keys() and len(whole) > 50
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


DRY = ("preset=tiny", "model=null", "settings.height=64", "settings.width=64", "parallel.micro_batch=null")


@pytest.mark.parametrize("preset", ["tiny/qad", "wan/qad", "cpu/qad"])
def test_a_dry_run_of_every_preset_needs_no_weights(
    preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ("qad.steps=2", "stages=[{frames: 8, batch: 1, steps: 1}]")
    options = ["--dry-run", "1", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main(["distill", preset, *DRY, *short, *options]) == 0
    assert "stage 0 | 1 steps" in capsys.readouterr().out and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["method=quad"], "method is 'quad'; expected one of 'dmd', 'qad'"),
        (["optimizer.learning_rate=null"], "optimizer.learning_rate is None; expected float"),
        (["dmd.sigma_min=0.1"], "dmd.sigma_min is set, and method=qad does not use it; leave it out"),
        (["rollout.steps=2"], "rollout.steps is set, and method=qad does not use it"),
        (["student_every=2"], "student_every is set, and method=qad does not use it"),
        (["critic_optimizer.learning_rate=1"], "critic_optimizer.learning_rate is set, and method=qad"),
        (["lora.rank=4"], "lora.rank is set, and qad.train=weights does not use it; set qad.train=lora"),
        (["adapter=somewhere"], "adapter is set, and qad.train=weights does not use it"),
        (["backbone.precision=bf16"], "backbone.precision is 'bf16'; expected 'nvfp4'"),
        (["qad.train=all"], "qad.train is 'all'; expected one of"),
        (["qad.steps=0"], "qad.steps is 0; expected"),
        (["qad.levels=any"], "qad.levels is 'any'; expected one of"),
        (["teacher=tiny"], "their transformer must be equal"),
    ],
)
def test_bad_settings_are_refused(
    home: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(arguments(home, "bad", *more), capsys)


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_settings_of_qad_are_refused_with_dmd(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(["distill", "cpu/dmd", "qad.steps=2", "-o", "none"], capsys)
    assert "qad.steps is set, and method=dmd does not use it; set method=qad" in message


def test_packed_teachers_and_a_lonely_prompt_are_refused(
    home: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = run / "model"
    message = refusal(arguments(home, "bad", f"teacher={packed}"), capsys)
    assert f"the teacher {packed} has packed 4-bit weights; expected bf16 weights" in message
    assert "the teacher" in refusal(arguments(home, "bad", f"model={packed}"), capsys)
    message = refusal(arguments(home, "bad", f"model={packed}", f"teacher={home / 'model'}"), capsys)
    assert "with qad.train=weights, the student" in message
    (home / "one.txt").write_text("a ball\n")
    message = refusal(arguments(home, "bad", f"prompts={home / 'one.txt'}"), capsys)
    assert "has 1 prompt; expected at least 2, of which one is held out; set qad.validation_batches=0" in message


def test_prompts_that_are_held_out_are_not_trained_on(home: Path) -> None:
    own = recipe(home)
    assert own.held_out is not None and own.scripts.held_out is not None
    drawn = [
        {scripts.draw(0, number, 2).prompts[0] for number in range(12)}
        for scripts in (own.scripts.train, own.scripts.held_out)
    ]
    assert len(drawn[0]) == 2 and len(drawn[1]) == 1 and not drawn[0] & drawn[1]
    assert recipe(home, "qad.validation_batches=0").validate() == {}
