"""Other adapters are refused before any weight is read where the GPU is too small, with the estimate of loading."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from longvideo.checkpoint.choices import AdapterChoice
from longvideo.checkpoint.chosen_adapters import open_choice
from longvideo.checkpoint.conversion import ConversionOptions, convert_model
from longvideo.checkpoint.folder import ModelFolder
from longvideo.errors import UserError
from longvideo.infer.fit.memory import CONTEXT_BYTES, Workload, estimate, loaded_bytes
from longvideo.infer.fit.placement import Placement
from longvideo.infer.fit.shapes import folder_shapes
from longvideo.infer.generation import Models
from longvideo.infer.loading import load_models
from longvideo.infer.pipeline import StreamingPipeline
from longvideo.infer.reloading import check_reloading
from longvideo.infer.script import Script
from longvideo.infer.text_encoder import encode_prompts, load_text_encoder
from longvideo.quantization.number_formats import NumberFormats
from tests.infer.workloads import FIRST, SetFree, total

LAYER, RANK = "blocks.0.self_attn.q", 96
FORMATS = NumberFormats("nvfp4-weights", decoder="bf16")
HERE, THERE = (Placement(device, device, dtype=torch.bfloat16) for device in (torch.device("cpu"), FIRST))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return tiny in 4 bits, next to whose weights adapters stay."""
    folder = tmp_path_factory.mktemp("packed") / "tiny"
    convert_model(ModelFolder.open("tiny"), folder, ConversionOptions(precision="nvfp4"))
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows, columns = ModelFolder.open("tiny").weights("transformer").infos[f"{LAYER}.weight"].shape
    file = tmp_path_factory.mktemp("adapters") / "style.safetensors"
    down, up = torch.zeros(RANK, columns), torch.zeros(rows, RANK)
    save_file({f"diffusion_model.{LAYER}.lora_A": down, f"diffusion_model.{LAYER}.lora_B": up}, file)
    return file


@pytest.fixture
def on_gpu(packed: Path) -> Models:
    """Return models that are on the CPU, and whose placement is a GPU."""
    return replace(load_models(ModelFolder.open(packed), HERE, formats=FORMATS, decoder_name="wan"), placement=THERE)


def adapted(folder: ModelFolder, adapter: Path) -> ModelFolder:
    return folder.with_other_adapters([open_choice(AdapterChoice(str(adapter), 1.0))])


def workload(folder: ModelFolder) -> Workload:
    return Workload(shapes=folder_shapes(folder), formats=FORMATS, placement=THERE)


@pytest.mark.parametrize("precision", ["bf16", "nvfp4-weights"])
@pytest.mark.parametrize("text_encoder", ["bf16", "fp8"])
def test_the_estimate_of_loaded_weights_is_what_they_take(precision: Any, text_encoder: Any) -> None:
    formats = NumberFormats(precision, decoder="bf16", text_encoder=text_encoder)
    folder = ModelFolder.open("tiny")
    models: Any = load_models(folder, HERE, formats=formats, decoder_name="wan")
    modules = (models.transformer, models.decoder._autoencoder, models.text_encoder.model)
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    allocated = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    estimated = loaded_bytes(Workload(shapes=folder_shapes(folder), formats=formats, placement=THERE))
    assert estimated.keys() == {FIRST}
    assert estimated[FIRST] - CONTEXT_BYTES == pytest.approx(allocated, rel=0.01)


def test_adapters_are_refused_before_any_weight_is_read(
    on_gpu: Models, adapter: Path, gpus: SetFree, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, folder = StreamingPipeline(on_gpu), on_gpu.folder
    assert folder is not None
    needed = total(estimate(workload(adapted(folder, adapter))))
    own = loaded_bytes(workload(folder))[FIRST]
    gpus((needed - own + 1000) / 1e9)
    check_reloading(on_gpu, adapted(folder, adapter))
    free = gpus((needed - own - 1000) / 1e9)
    check_reloading(on_gpu, folder)
    monkeypatch.setattr(ModelFolder, "load_transformer", lambda *_, **__: pytest.fail("a weight was read"))
    sizes = rf"{needed / 1e9:.1f} GB free; streaming needs about 1\.\d GB: CUDA context"
    with pytest.raises(UserError, match=f"^cuda:0 without the loaded model has {sizes}") as error:
        pipeline.set_adapters([adapter])
    assert "\n" not in str(error.value) and re.search(r"with --\S+.* it needs", str(error.value))
    assert pipeline.models is on_gpu and free


def test_a_text_encoder_that_is_freed_is_not_counted(on_gpu: Models, gpus: SetFree) -> None:
    folder = on_gpu.folder
    assert folder is not None
    script = Script.from_prompts("a red ball", seconds=1.0)
    known = encode_prompts(
        lambda: load_text_encoder(folder, HERE, FORMATS), [script], cut_prefix="", device=HERE.text_device
    )
    own = workload(folder)
    without = replace(own, shapes=replace(own.shapes, text_encoder=None))
    needed, loaded = total(estimate(without)), loaded_bytes(without)[FIRST]
    gpus((needed - loaded + 1000) / 1e9)
    check_reloading(replace(on_gpu, text_encoder=known), folder)
    gpus((needed - loaded - 1000) / 1e9)
    with pytest.raises(UserError, match="without the loaded model has"):
        check_reloading(replace(on_gpu, text_encoder=known), folder)
