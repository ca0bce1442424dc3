"""`longvideo distill` on a small random model: its run folder, interrupted runs, and bad settings."""

from __future__ import annotations

import json
import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from longvideo.checkpoint.adapters import Adapter
from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.latents import open_latents
from longvideo.cli.main import main
from longvideo.data.encoded import EncodedDataset
from longvideo.distill.config import BackboneConfig
from longvideo.distill.engine import PairedEngine
from longvideo.distill.prompts import DistillStage
from longvideo.distill.roles import LoraSettings
from longvideo.model.attention import Full
from longvideo.model.layout import TokenLayout
from longvideo.model.spec import ChunkSpec
from longvideo.model.transformer import CausalTransformer
from tests.checkpoint import small
from tests.cli.distillation import arguments
from tests.golden import relative_error
from tests.training.killing import run_killed

PRELOADED = ["torch", "longvideo.distill.dmd_recipe", "longvideo.training.run"]


def velocity(model: CausalTransformer) -> Tensor:

    grid = ChunkSpec(grid_height=2, grid_width=3, chunk_frames=2, window_frames=4, sink_frames=0, pin_shots=False)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 2, 4, 6, generator=generator)
    features = torch.randn(1, 32, 128, generator=generator)
    with torch.no_grad():
        rope = model.rope(TokenLayout.block_causal(grid, 1))
        text = model.encode_text(features)
        return model(latents, torch.full((1, 2), 0.5), text, rope=rope, attention=Full())


def test_a_run_leaves_an_adapter_and_a_model_of_few_steps(distill_run: Path, distill_folder: Path) -> None:
    lines = [json.loads(line) for line in (distill_run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [("student_loss" in line) for line in steps] == [True, False, True, False]
    assert all(line["grad"] > 0 for line in steps) and all(line["dmd_gradient"] > 0 for line in steps[::2])
    assert any(name.startswith("critic_") for name in steps[0])
    folder = ModelFolder.open(distill_run / "model")
    assert (folder.settings.steps, folder.settings.guidance, folder.settings.clean_pass) == (4, 1.0, True)
    assert {path.name for path in (distill_run / "samples").iterdir()} == {
        "student_0000004_4_steps.png",
        "student_0000004_4_steps.latents.safetensors",
        "student_0000004_2_steps.png",
        "student_0000004_2_steps.latents.safetensors",
    }
    latents = open_latents(distill_run / "samples" / "student_0000004_2_steps.latents.safetensors")
    assert latents.header.model == str(distill_folder / "model") and latents.num_videos == 2
    latents.check_values()


def test_in_the_precision_of_a_gpu_and_with_a_critic_that_goes_first(distill_folder: Path) -> None:
    assert main(arguments(distill_folder, "bf16", "trainer.precision=bf16", "critic_first=1", "dmd.shift=2")) == 0
    lines = [json.loads(line) for line in (distill_folder / "bf16" / "metrics.jsonl").read_text().splitlines()]
    assert ["student_loss" in line for line in lines if "loss" in line] == [False, False, True, False]
    assert len(list((distill_folder / "bf16" / "samples").glob("*.png"))) == 2


def test_the_merged_model_is_backbone_and_adapter(distill_run: Path) -> None:
    merged = ModelFolder.open(distill_run / "model").load_transformer(dtype=torch.float32)
    adapter, plain = Adapter.load(distill_run / "lora"), small.transformer()
    weights = plain.state_dict()
    for layer in adapter.layers:
        update = adapter.weights[f"{layer}.lora_B"] @ adapter.weights[f"{layer}.lora_A"]
        assert update.abs().max() > 0
        weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + 8 / 4 * update
    assert len(adapter.layers) == 10 * small.TRANSFORMER.num_layers
    for name, tensor in merged.state_dict().items():
        assert relative_error(tensor, weights[name]) < 1e-6, name


def test_peft_and_diffusers_read_the_adapter(distill_run: Path) -> None:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
    from peft import PeftModel

    expected_velocity = velocity(ModelFolder.open(distill_run / "model").load_transformer(dtype=torch.float32))
    plain = small.transformer()
    assert relative_error(velocity(plain), expected_velocity) > 1e-3
    PeftModel.from_pretrained(plain, str(distill_run / "lora"))
    assert relative_error(velocity(plain), expected_velocity) < 1e-5

    theirs, source = (
        WanTransformer3DModel.from_pretrained(distill_run / name / "transformer") for name in ("model", "../model")
    )
    source.load_lora_adapter(load_file(distill_run / "lora" / "pytorch_lora_weights.safetensors"), prefix="transformer")
    source.fuse_lora()
    weights = {name.replace(".base_layer", ""): tensor for name, tensor in source.state_dict().items()}
    for name, tensor in theirs.state_dict().items():
        assert relative_error(weights[name], tensor) < 1e-5, name


def state(folder: Path, step: int = 4) -> dict[str, Tensor]:
    place = folder / "checkpoints" / f"step_{step:07d}"
    return {name: tensor for path in place.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and len(one) > 100
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def distil(home: str, name: str, reports: Connection) -> None:
    """Distill to the end, reporting every step."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    one_step = PairedEngine.train_step

    def reported(self: PairedEngine, shares: Any, step: int, learning_rate: float) -> dict[str, Tensor]:
        metrics = one_step(self, shares, step, learning_rate)
        reports.send(step)
        return metrics

    PairedEngine.train_step = reported
    code = main(arguments(Path(home), name, "trainer.save_every=1", "samples.prompts=0"))
    reports.close()
    os._exit(code)


def test_killed_at_any_moment_it_ends_with_the_same_bits(distill_folder: Path) -> None:
    run_killed(distil, str(distill_folder), "killed", kills=4, most_steps=2, preloaded=PRELOADED)
    run_killed(distil, str(distill_folder), "whole", kills=0, most_steps=1, preloaded=PRELOADED)
    assert_same_bits(state(distill_folder / "killed"), state(distill_folder / "whole"))
    adapters = [
        (distill_folder / name / "lora" / "adapter_model.safetensors").read_bytes() for name in ("killed", "whole")
    ]
    assert adapters[0] == adapters[1]


def test_two_step_training_goes_on_from_an_adapter(
    distill_folder: Path, distill_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = (f"adapter={distill_run / 'lora'}", "rollout.steps=2", "optimizer.learning_rate=1e-12", "lora.alpha=4")
    assert main(arguments(distill_folder, "two", *more, "samples.prompts=0", "merge=false", steps=2)) == 0
    assert not (distill_folder / "two" / "model").exists()
    merge = capsys.readouterr().out.splitlines()[-1]
    assert merge.startswith("next: longvideo merge") and merge.endswith("--steps 2")
    last_step = (*more, "rollout.cache_fill=last_step", "samples.prompts=0", "merge=false")
    assert main(arguments(distill_folder, "kept", *last_step, steps=2)) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("--steps 2 --no-clean-pass")
    before, after = Adapter.load(distill_run / "lora"), Adapter.load(distill_folder / "two" / "lora")
    assert (before.scaling, after.scaling) == (2.0, 1.0)
    for layer in before.layers:
        updates = [x.scaling * x.weights[f"{layer}.lora_B"] @ x.weights[f"{layer}.lora_A"] for x in (before, after)]
        assert relative_error(updates[1], updates[0]) < 1e-4


def test_a_dry_run_needs_no_weights(distill_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["preset=tiny", "settings.height=64", "settings.width=64"]
    more = [*sizes, "model=null", "teacher=another", "stages=[{frames: 16, batch: 1, steps: 1}]"]
    dry = arguments(distill_folder, "dry", *more, precision="nvfp4")
    assert main([*dry, "--dry-run", "1"]) == 0
    assert "stage 0 | 1 steps" in capsys.readouterr().out and not (distill_folder / "dry").exists()
    assert "model is not set" in refusal(dry, capsys)


def test_settings_other_than_those_of_the_model_are_refused(
    distill_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = arguments(distill_folder, "settings", "settings.chunk_frames=4")
    assert "settings.chunk_frames is 4; expected 8, as the model in" in refusal(other, capsys)


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["stages=[{frames: 12, batch: 2, steps: 1}]"], "videos have 12 latent frames; expected a multiple of 8"),
        (["rollout.exits=never"], "rollout.exits is 'never'; expected one of"),
        (["rollout.cache_fill=never"], "rollout.cache_fill is 'never'"),
        (["dmd.sigma_min=0"], "dmd.sigma_min is 0.0; expected"),
        (["lora.rank=0"], "lora.rank is 0; expected"),
        (["dmd.shift=0"], "dmd.shift is 0.0; expected"),
        (["student_every=0"], "student_every is 0; expected"),
        (["critic_first=-1"], "critic_first is -1; expected"),
        (["critic_first=1", "student_every=4"], "the student would first train after 4 steps, but the stages have 4"),
        (["stages=[]"], "stages is empty; expected at least one stage"),
        (["lora.targets=[]"], "lora.targets is empty; expected some of q, k, v, o, ffn.0, ffn.2"),
        (["lora.targets=[q, w]"], "lora.targets contains 'w', but no linear layer of the blocks has such a name"),
        (["image_fraction=0.5"], "set data=CLIPS"),
        (["parallel.zero_stage=3"], "expected 0, 1 or 2"),
        (["backbone.precision=int8"], "backbone.precision is 'int8'"),
        (["prompts=nowhere.txt"], "cannot read the file of prompts nowhere.txt: no such file"),
    ],
)
def test_bad_settings_are_refused(
    distill_folder: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(arguments(distill_folder, "bad", *more), capsys)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("empty.txt", "", "is empty"),
        ("gap.txt", "a ball\n\na red ball\n", "gap.txt:2 has an empty prompt"),
        ("broken.jsonl", '{"prompts": ["a ball"\n', "broken.jsonl:1 is not JSON"),
        ("other.jsonl", '{"text": "a ball"}\n', "other.jsonl:1 is not an object of the form"),
        ("none.jsonl", '{"prompts": []}\n', "none.jsonl:1 has an empty prompt"),
        (
            "half.jsonl",
            '{"prompts": ["a ball"]}\n{"prompts": ["a \\ud83d"]}\n',
            "half.jsonl:2: the prompt is not valid text",
        ),
        (
            "away.jsonl",
            '{"prompts": ["a ball"], "negative_prompt": ""}\n{"prompts": ["a"], "negative_prompt": "blurry"}\n',
            "away.jsonl:2 has the negative prompt 'blurry'; expected ''",
        ),
        ("latin.txt", b"a ball\na r\xe9d ball\n", "latin.txt:2 is not UTF-8 text (byte 0xe9)"),
    ],
)
def test_bad_prompt_files_are_refused(
    distill_folder: Path, name: str, text: str | bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (distill_folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in refusal(arguments(distill_folder, "bad", f"prompts={distill_folder / name}"), capsys)


def test_adapters_and_teachers_that_do_not_fit_are_refused(
    distill_folder: Path, distill_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read before the error was found")

    monkeypatch.setattr(ModelFolder, "load_transformer", unread)
    lora = f"adapter={distill_run / 'lora'}"
    assert "lora.rank is 8; expected 4, the rank of the adapter" in refusal(
        arguments(distill_folder, "bad", lora, "lora.rank=8"), capsys
    )
    fewer = refusal(arguments(distill_folder, "bad", lora, "lora.targets=[q,k,v,o]"), capsys)
    assert "lora.targets is q, k, v, o; expected the layers that the adapter" in fewer and "blocks.0.ffn.0" in fewer
    # the shipped model has wider layers
    message = refusal(arguments(distill_folder, "bad", lora, "model=tiny"), capsys)
    assert "blocks.0." in message and "tiny at rank 4" in message
    message = refusal(arguments(distill_folder, "bad", "teacher=tiny"), capsys)
    assert "the student" in message and "the teacher" in message and "must be equal" in message


def test_scripts_of_several_shots_are_computed_one_by_one(
    distill_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (distill_folder / "shots.jsonl").write_text('{"prompts": ["a ball", "a red ball"]}\n{"prompts": ["a blue ball"]}\n')
    more = (f"prompts={distill_folder / 'shots.jsonl'}", "samples.prompts=0", "merge=false")
    assert "use parallel.micro_batch=1" in refusal(arguments(distill_folder, "shots", *more, steps=1), capsys)
    assert main(arguments(distill_folder, "shots", *more, "parallel.micro_batch=1", steps=1)) == 0


def test_clips_give_captions_cuts_and_first_frames(distill_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from longvideo.distill.config import Distillation
    from longvideo.distill.dmd_recipe import DmdRecipe
    from longvideo.distributed import Mesh
    from tests.data import footage

    manifest = footage.footage(distill_folder / "footage")
    encode = [
        "--model",
        str(distill_folder / "model"),
        "--out",
        str(distill_folder / "clips"),
        "--chunks",
        "2",
        "--workers",
        "0",
    ]
    assert main(["data", "encode", str(manifest), *encode, "--device", "cpu"]) == 0
    more = (f"data={distill_folder / 'clips'}", "image_fraction=1", "parallel.micro_batch=1", "merge=false")
    assert main(arguments(distill_folder, "images", *more, steps=2)) == 0
    assert (distill_folder / "images" / "samples" / "student_0000002_2_steps.png").is_file()
    stages = [DistillStage(frames=16, batch=3, steps=1)]
    config = Distillation(
        model=str(distill_folder / "model"),
        data=str(distill_folder / "clips"),
        image_fraction=1.0,
        stages=stages,
        lora=LoraSettings(rank=4),
        backbone=BackboneConfig(precision="bf16"),
    )
    recipe = DmdRecipe(config, torch.device("cpu"))
    dataset = EncodedDataset.open(distill_folder / "clips")
    seen = []
    for step in range(2):
        for clip in recipe.source.shares(step, Mesh(), 1):
            assert clip.first_latent is not None
            firsts = [torch.equal(clip.first_latent[0], dataset.latents(i, 0, 1)) for i in range(len(dataset))]
            (index,) = [i for i, same in enumerate(firsts) if same]
            seen.append(index)
            assert clip.cuts == (True, *dataset.clips[index].cuts[1:])
            for rows, caption in zip(clip.prompt_NB, dataset.clips[index].captions, strict=True):
                assert torch.equal(clip.features_PJD[rows[0]], dataset.text(caption))
    assert sorted(seen) == list(range(len(dataset)))
    capsys.readouterr()
    longer = arguments(distill_folder, "longer", *more, "stages=[{frames: 24, batch: 2, steps: 1}]")
    assert "have 16 latent frames; expected at least 24" in refusal(longer, capsys)
    other = arguments(distill_folder, "other", *more, "model=tiny")
    assert "latent channels of" in refusal(other, capsys)
