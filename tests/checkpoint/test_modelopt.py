"""Folders that NVIDIA ModelOpt exported are read with the weights that it computes with, in the blocks and outside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longvideo.checkpoint.conversion import ConversionOptions, convert_model
from longvideo.checkpoint.folder import ModelFolder
from longvideo.kernels.nvfp4 import reference
from longvideo.model.attention import Masked
from longvideo.model.layout import TokenLayout
from longvideo.model.spec import ChunkSpec
from longvideo.model.transformer import CausalTransformer
from longvideo.quantization.convert import with_precision
from longvideo.quantization.linear import NVFP4Linear

FIXTURES = Path(__file__).parents[1] / "fixtures"
VALUES = load_file(FIXTURES / "modelopt_values.safetensors")
LAYERS = {"blocks.0.ffn.net.0.proj": "blocks.0.ffn.0", "condition_embedder.time_embedder.linear_1": "time_embedding.0"}
SPEC = ChunkSpec(grid_height=2, grid_width=3, chunk_frames=2, window_frames=8, sink_frames=2, pin_shots=False)
EXPORTS = ("modelopt_nvfp4", "modelopt_fp8", "modelopt_fp8_rows")


def weight_of(model: CausalTransformer, layer: str) -> torch.Tensor:
    module = model.get_submodule(layer)
    if isinstance(module, NVFP4Linear):
        return reference.dequantize(module.quantized_weight)
    assert isinstance(module, torch.nn.Linear)
    return module.weight


@torch.no_grad()
def velocity(model: CausalTransformer) -> torch.Tensor:
    config, layout = model.config, TokenLayout.block_causal(SPEC, 2)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, config.in_channels, 4, 4, 6, generator=generator)
    text = model.encode_text(torch.randn(1, 512, config.text_dim, generator=generator))
    return model(latents, torch.full((1, 4), 0.5), text, rope=model.rope(layout), attention=Masked(layout))


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize("theirs", LAYERS)
def test_weights_are_those_that_modelopt_computes_with(export: str, theirs: str) -> None:
    folder = ModelFolder.open(FIXTURES / export)
    assert folder.is_packed is (export == "modelopt_nvfp4")
    weight, expected = weight_of(folder.load_transformer(), LAYERS[theirs]), VALUES[f"{export}.{theirs}"]
    if folder.is_packed:
        assert torch.equal(weight, expected)
    else:
        # the export rounds the quotient of weight and scale to bf16 before E4M3, the simulation does not
        difference = (weight - expected).abs() / expected.abs().clamp_min(1e-6)
        assert (difference < 1e-6).float().mean() > 0.9 and difference.max() < 0.125 + 1e-6
    assert torch.count_nonzero(expected) > 500


def test_codes_and_scales_come_back_from_our_folder_bit_for_bit(tmp_path: Path) -> None:
    source = FIXTURES / "modelopt_nvfp4"
    convert_model(ModelFolder.open(source), tmp_path / "ours", ConversionOptions())
    convert_model(ModelFolder.open(tmp_path / "ours"), tmp_path / "back", ConversionOptions("modelopt"))
    before = load_file(source / "diffusion_pytorch_model.safetensors")
    after = load_file(tmp_path / "back" / "transformer" / "diffusion_pytorch_model.safetensors")
    without = {name for name in before if not name.endswith("input_scale")}
    assert after.keys() == without and len(without) < len(before)
    for name in without:
        assert torch.equal(after[name].reshape(-1).view(torch.uint8), before[name].reshape(-1).view(torch.uint8)), name


def test_the_forward_is_that_of_the_dequantized_weights() -> None:
    folder = ModelFolder.open(FIXTURES / "modelopt_nvfp4")
    packed = with_precision(folder.load_transformer(), "nvfp4-weights", packed=True)
    plain = with_precision(folder.load_transformer(), "nvfp4-weights", packed=True)
    for name, module in [*plain.named_modules()]:
        if isinstance(module, NVFP4Linear):
            linear = torch.nn.Linear(module.in_features, module.out_features, bias=True)
            linear.weight = torch.nn.Parameter(reference.dequantize(module.quantized_weight, torch.bfloat16))
            assert module.bias is not None
            linear.bias = module.bias
            plain.set_submodule(name, linear)
    ours, expected = velocity(packed), velocity(plain)
    assert torch.equal(ours, expected) and ours.abs().mean() > 0.1
