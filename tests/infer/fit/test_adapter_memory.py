"""The estimate counts the adapters of a packed model, which stay next to its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from longvideo.checkpoint.choices import adapter_choices
from longvideo.checkpoint.conversion import ConversionOptions, convert_model
from longvideo.checkpoint.folder import ModelFolder
from longvideo.infer.fit.memory import estimate
from longvideo.infer.fit.shapes import folder_shapes
from longvideo.quantization.number_formats import NumberFormats
from tests.infer.workloads import named, workload

KEPT, WIDENED, RANK = "blocks.0.ffn.2", "blocks.1.self_attn.o", 96


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return tiny in 4 bits, with one layer that is kept."""
    folder = tmp_path_factory.mktemp("packed") / "tiny"
    convert_model(ModelFolder.open("tiny"), folder, ConversionOptions(precision="nvfp4", keep=(KEPT,)))
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an adapter of a large rank for three layers, and a difference of another one."""
    weights = ModelFolder.open("tiny").weights("transformer")
    tensors = {f"diffusion_model.{WIDENED}.diff": torch.zeros(weights.infos[f"{WIDENED}.weight"].shape)}
    for layer in ("blocks.0.self_attn.q", "blocks.1.ffn.0", KEPT):
        rows, columns = weights.infos[f"{layer}.weight"].shape
        tensors[f"diffusion_model.{layer}.lora_down.weight"] = torch.zeros(RANK, columns)
        tensors[f"diffusion_model.{layer}.lora_up.weight"] = torch.zeros(rows, RANK)
    file = tmp_path_factory.mktemp("adapters") / "large.safetensors"
    save_file(tensors, file)
    return file


@pytest.mark.parametrize("strengths", [(), ("1",), ("1", "-0.5"), ("0",)])
def test_the_estimate_of_packed_weights_with_adapters_is_what_they_take(
    packed: Path, adapter: Path, strengths: tuple[str, ...]
) -> None:
    folder = ModelFolder.open(packed, adapters=adapter_choices([f"{adapter}:{strength}" for strength in strengths]))
    model = folder.load_transformer(dtype=torch.bfloat16)
    tensors = (*model.parameters(), *model.buffers())
    allocated = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    shapes, formats = folder_shapes(folder), NumberFormats("nvfp4-weights")
    assert shapes.branch_rank == RANK * sum(strength != "0" for strength in strengths)
    estimated = named(estimate(workload(shapes=shapes, formats=formats)))["transformer"]
    assert estimated == pytest.approx(allocated, rel=0.001)
