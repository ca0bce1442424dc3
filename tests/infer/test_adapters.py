"""Generation with adapters equals generation with the model that they were merged into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from longvideo.checkpoint.adapters import layer_sizes
from longvideo.checkpoint.choices import StoredPrecision
from longvideo.checkpoint.conversion import ConversionOptions, convert_model
from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.latents import open_latents
from longvideo.checkpoint.modules import OnMeta
from longvideo.cli.main import main
from longvideo.errors import UserError
from longvideo.infer.pipeline import StreamingPipeline
from longvideo.model.transformer import CausalTransformer

PROMPT = "a red ball bounces"


@pytest.fixture(scope="module")
def adapter(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_of(model_folder, 0.2, tmp_path_factory.mktemp("adapters") / "style.safetensors")


def adapter_of(model: Path, deviation: float, file: Path) -> Path:
    """Write an adapter of all linear layers of the blocks, in the naming of kohya."""
    with OnMeta():
        sizes = layer_sizes(CausalTransformer(ModelFolder.open(model).transformer_config))
    generator = torch.Generator().manual_seed(7)
    tensors: dict[str, torch.Tensor] = {}
    for layer, (rows, columns) in sizes.items():
        name = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = deviation * torch.randn(4, columns, generator=generator)
        tensors[f"{name}.lora_up.weight"] = deviation * torch.randn(rows, 4, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, file)
    return file


def video(pipeline: StreamingPipeline) -> np.ndarray:
    return np.concatenate(list(pipeline.stream(PROMPT, seconds=2, seed=1)))


def test_adapters_in_python_equal_a_merged_model(
    model_folder: Path, adapter: Path, pipeline: StreamingPipeline, tmp_path: Path
) -> None:
    words = [f"{adapter}:0.5", str(adapter)]
    options = [word for one in words for word in ("--adapter", one)]
    assert main(["convert", str(model_folder), str(tmp_path / "merged"), *options]) == 0
    cpu = {"device": "cpu", "dtype": torch.float32}
    added = StreamingPipeline.from_pretrained(model_folder, adapters=words, **cpu)
    merged = StreamingPipeline.from_pretrained(tmp_path / "merged", **cpu)
    assert np.array_equal(video(added), video(merged))
    assert not np.array_equal(video(added), video(pipeline))
    place = "/".join(adapter.parts[-2:])
    assert added.start_line().endswith(f" | adapters: {place}:0.5, {place}")


def test_generate_with_an_adapter_writes_the_latents_of_the_merged_model(
    model_folder: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(model_folder), str(tmp_path / "merged"), "--adapter", f"{adapter}:0.5"]) == 0
    runs = {"added": [str(model_folder), "--adapter", f"{adapter}:0.5"], "merged": [str(tmp_path / "merged")]}
    for name, model in runs.items():
        command = ["generate", PROMPT, "--seconds", "2", "--device", "cpu", "--model", *model]
        command += ["-o", str(tmp_path / f"{name}.mp4"), "--latents", str(tmp_path / f"{name}.safetensors")]
        assert main(command) == 0, capsys.readouterr().err
    adapters = "/".join(adapter.parts[-2:]) + ":0.5"
    headers = [open_latents(tmp_path / f"{name}.safetensors").header for name in runs]
    assert [header.adapters for header in headers] == [adapters, None]
    added, merged = (load_file(tmp_path / f"{name}.safetensors") for name in runs)
    assert added.keys() == merged.keys()
    for name, tensor in added.items():
        assert torch.equal(tensor, merged[name])


def test_a_snapshot_names_the_adapters(
    model_folder: Path, adapter: Path, pipeline: StreamingPipeline, tmp_path: Path
) -> None:
    added = StreamingPipeline.from_pretrained(
        model_folder, adapters=[f"{adapter}:0.5"], device="cpu", dtype=torch.float32
    )
    with added.session(PROMPT) as session:
        while session.next_chunk < 1:
            next(session)
        session.snapshot(tmp_path / "session.safetensors")
    with pytest.raises(UserError, match=r"its adapters is \['.*/style\.safetensors:0\.5'\]; expected None"):
        pipeline.restore(tmp_path / "session.safetensors")
    with added.restore(tmp_path / "session.safetensors") as session:
        assert session.next_chunk == 1


def test_adapters_that_cannot_be_used_are_refused_before_the_output_is_created(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for adapter, message in (
        (str(tmp_path / "missing.safetensors"), "there is no adapter"),
        ("loras/missing.safetensors", "there is no adapter"),
        (f"{model_folder}:2", "is not an adapter but a"),
        ("x:nan", "the adapter x has the strength nan; expected a finite number"),
    ):
        command = ["generate", PROMPT, "--model", str(model_folder), "--adapter", adapter, "--device", "cpu"]
        assert main([*command, "-o", str(tmp_path / "out.mp4")]) == 2
        error = capsys.readouterr().err
        assert message in error.splitlines()[-1] and not (tmp_path / "out.mp4").exists()
    with pytest.raises(UserError, match="adapters is 'lora'; expected a list of paths"):
        StreamingPipeline.from_pretrained(model_folder, adapters="lora", device="cpu")
    assert main(["bench", "stream", "--adapter", "lora"]) == 2
    assert "--adapter is an option of a model; use --model" in capsys.readouterr().err


@pytest.mark.parametrize(("precision", "offload"), [("fp32", False), ("nvfp4", False), ("nvfp4", True)])
def test_set_adapters_gives_the_bits_of_a_new_pipeline_and_none_those_of_the_base(
    model_folder: Path, adapter: Path, tmp_path: Path, precision: StoredPrecision, offload: bool
) -> None:
    convert_model(ModelFolder.open(model_folder), tmp_path / "base", ConversionOptions(precision=precision))
    cpu: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
    pipeline = StreamingPipeline.from_pretrained(tmp_path / "base", offload_weights=offload, **cpu)
    before = video(pipeline)
    pipeline.set_adapters([f"{adapter}:0.5", adapter])
    place = "/".join(adapter.parts[-2:])
    assert pipeline.start_line().endswith(f" | adapters: {place}:0.5, {place}")
    new = StreamingPipeline.from_pretrained(tmp_path / "base", adapters=[f"{adapter}:0.5", adapter], **cpu)
    changed = video(pipeline)
    assert np.array_equal(changed, video(new)) and not np.array_equal(changed, before)
    pipeline.set_adapters([])
    assert np.array_equal(video(pipeline), before) and "adapters" not in pipeline.start_line()


def test_adapters_change_only_between_videos(model_folder: Path, adapter: Path) -> None:
    pipeline = StreamingPipeline.from_pretrained(model_folder, device="cpu", dtype=torch.float32)
    with pipeline.session(PROMPT) as session:
        next(session)
        with pytest.raises(UserError, match="cannot change while a video is generated; finish or close it first"):
            pipeline.set_adapters([adapter])
        assert pipeline.models.adapters == ()
    waiting = pipeline.session(PROMPT)
    pipeline.set_adapters([f"{adapter}:0.5"])
    with pytest.raises(UserError, match="adapters have changed since the session began; start another session"):
        next(waiting)


def test_after_an_adapter_that_cannot_be_read_the_earlier_ones_stay(
    model_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    pipeline = StreamingPipeline.from_pretrained(
        model_folder, adapters=[f"{adapter}:0.5"], device="cpu", dtype=torch.float32
    )
    before, tensors = video(pipeline), load_file(adapter)
    name = next(name for name in tensors if name.endswith("lora_up.weight"))
    save_file({**tensors, name: tensors[name] * float("nan")}, tmp_path / "damaged.safetensors")
    for wrong, message in ((tmp_path / "damaged.safetensors", "NaN or infinity"), (tmp_path / "none", "no adapter")):
        with pytest.raises(UserError, match=message):
            pipeline.set_adapters([wrong])
    assert np.array_equal(video(pipeline), before)
    assert pipeline.models.adapters == ("/".join(adapter.parts[-2:]) + ":0.5",)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp8", "nvfp4", "nvfp4-weights"])
def test_a_gpu_changes_adapters_that_recorded_passes_contain(precision: Any, tmp_path: Path) -> None:
    """Weights in host memory are the form without CUDA graphs, and must give the same bits."""
    packed = "fp32" if precision in ("bf16", "fp8") else "nvfp4"
    convert_model(ModelFolder.open("tiny"), tmp_path / "base", ConversionOptions(precision=packed))
    adapter = adapter_of(Path("tiny"), 0.02, tmp_path / "style.safetensors")
    gpu: dict[str, Any] = {"device": "cuda", "precision": precision}
    pipeline = StreamingPipeline.from_pretrained(tmp_path / "base", **gpu)
    before = video(pipeline)
    pipeline.set_adapters([f"{adapter}:0.5", adapter])
    changed = video(pipeline)
    assert not np.array_equal(changed, before)
    others: tuple[dict[str, Any], ...] = ({}, {"offload_weights": True})
    for other in others:
        new = StreamingPipeline.from_pretrained(tmp_path / "base", adapters=[f"{adapter}:0.5", adapter], **gpu, **other)
        assert np.array_equal(video(new), changed)
    pipeline.set_adapters([])
    assert np.array_equal(video(pipeline), before)
