"""Layers with the scales of ComfyUI and NVIDIA ModelOpt are read with the values that those programs compute with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longvideo.checkpoint.conversion import ConversionOptions, convert_model
from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.names import to_diffusers
from longvideo.checkpoint.opening import open_weights
from longvideo.errors import CheckpointError
from longvideo.kernels.nvfp4 import reference
from longvideo.kernels.nvfp4.format import E2M1_MAX, E4M3_MAX, Rule
from longvideo.quantization.convert import set_product
from longvideo.quantization.linear import NVFP4Linear
from longvideo.quantization.products import W4A16
from tests.checkpoint import official

E4M3 = torch.float8_e4m3fn
LAYER = "blocks.1.ffn.0"


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return official.save(tmp_path_factory.mktemp("models") / "ours")


def layers_of(tensors: dict[str, Tensor]) -> list[str]:
    names = [name.removesuffix(".weight") for name, x in tensors.items() if name.endswith(".weight") and x.ndim == 2]
    return [name for name in names if name.startswith("blocks.") and "norm" not in name]


def in_fp8(tensors: dict[str, Tensor], leaf: str, *, rows: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a state with the layers of the blocks in scaled FP8, and the weights that it represents."""
    scaled, expected = dict(tensors), dict(tensors)
    for layer in layers_of(tensors):
        weight = tensors[f"{layer}.weight"]
        scale = (weight.abs().amax(1, keepdim=True) if rows else weight.abs().amax()) / E4M3_MAX
        scaled[f"{layer}.weight"] = values = (weight / scale).to(E4M3)
        scaled[f"{layer}.{leaf}"] = scale
        expected[f"{layer}.weight"] = values.float() * scale
    return scaled, expected


@pytest.mark.parametrize(
    ("leaf", "extra"),
    [
        ("scale_weight", {"scaled_fp8": torch.empty(0, dtype=E4M3), f"{LAYER}.scale_input": torch.ones(())}),
        (
            "weight_scale",
            {f"{LAYER}.comfy_quant": torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)},
        ),
        ("weight_scale", {f"{LAYER}.input_scale": torch.ones(1)}),
    ],
    ids=["ComfyUI, old", "ComfyUI", "ModelOpt"],
)
@pytest.mark.parametrize("rows", [False, True], ids=["one scale", "a scale for each row"])
def test_a_weight_in_scaled_fp8_is_its_values_times_its_scale(
    leaf: str, extra: dict[str, Tensor], rows: bool, ours: ModelFolder, tmp_path: Path
) -> None:
    scaled, expected = in_fp8(official.transformer().state_dict(), leaf, rows=rows)
    save_file({**scaled, **extra}, tmp_path / "fp8.safetensors")
    opened = ModelFolder.open(tmp_path / "fp8.safetensors", base=ours.path)
    state = opened.load_transformer().state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    convert_model(opened, tmp_path / "bf16", ConversionOptions())
    stored = ModelFolder.open(tmp_path / "bf16").weights("transformer")
    assert torch.equal(stored.read(f"{LAYER}.weight"), expected[f"{LAYER}.weight"].bfloat16())
    convert_model(opened, tmp_path / "nvfp4", ConversionOptions(precision="nvfp4"))
    codes = ModelFolder.open(tmp_path / "nvfp4").weights("transformer").read(f"{LAYER}.weight_codes")
    assert torch.equal(codes, reference.quantize(expected[f"{LAYER}.weight"], Rule.ADAPTIVE).codes)


def test_the_text_encoder_of_comfyui_gives_the_features_of_its_scaled_weights(
    ours: ModelFolder, tmp_path: Path
) -> None:
    encoder = ours.load_text_encoder()
    tensors = encoder.model.state_dict()
    tensors.pop("encoder.embed_tokens.weight", None)
    scaled, expected = dict(tensors), dict(tensors)
    for name in [name for name, x in tensors.items() if x.ndim == 2 and ".layer." in name and "bias" not in name]:
        scale = tensors[name].abs().amax() / E4M3_MAX
        scaled[name] = (tensors[name] / scale).to(E4M3)
        scaled[f"{name.removesuffix('.weight')}.scale_weight"] = scale
        expected[name] = scaled[name].float() * scale
    scaled["scaled_fp8"] = torch.empty(0, dtype=E4M3)
    save_file({name: x.contiguous() for name, x in scaled.items()}, tmp_path / "umt5.safetensors")
    opened = ModelFolder.open(tmp_path / "umt5.safetensors", base=ours.path)
    features = opened.load_text_encoder().encode(["a red ball"])[0]
    encoder.model.load_state_dict(expected, strict=False)
    assert torch.equal(features, encoder.encode(["a red ball"])[0])
    alone = ModelFolder.open(tmp_path / "umt5.safetensors")
    assert alone.parts == ("text_encoder",)
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json; copy it from google/umt5-xxl"):
        alone.load_text_encoder()


def as_modelopt(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state with the layers of the blocks as ModelOpt documents NVFP4: scale 2 is amax / (6 x 448)."""
    exported = dict(tensors)
    for layer in layers_of(tensors):
        quantized = reference.quantize(tensors[f"{layer}.weight"], Rule.STATIC6)
        amax = tensors[f"{layer}.weight"].abs().amax()
        torch.testing.assert_close(quantized.tensor_scale, amax / (E2M1_MAX * E4M3_MAX))
        exported[f"{layer}.weight"] = quantized.codes
        exported[f"{layer}.weight_scale"] = quantized.scales
        exported[f"{layer}.weight_scale_2"] = quantized.tensor_scale
        exported[f"{layer}.input_scale"] = torch.tensor(0.01)
    return exported


@torch.no_grad()
def test_an_export_of_modelopt_in_nvfp4_keeps_its_codes_and_scales_and_gives_our_forward(
    ours: ModelFolder, tmp_path: Path
) -> None:
    exported = as_modelopt(official.transformer().state_dict())
    folder = tmp_path / "export"
    convert_model(ours, folder, ConversionOptions("diffusers"))
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({to_diffusers(name): x for name, x in exported.items()}, weights)
    quantization = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["proj_out"]}
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    (folder / "transformer" / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    convert_model(ours, tmp_path / "packed", ConversionOptions(precision="nvfp4", rule=Rule.STATIC6))
    opened, own = ModelFolder.open(folder), ModelFolder.open(tmp_path / "packed")
    assert opened.is_packed
    models = [model.load_transformer() for model in (opened, own)]
    for model in models:
        set_product(model, W4A16(reference))
    layers = [model.get_submodule(LAYER) for model in models]
    assert all(isinstance(layer, NVFP4Linear) for layer in layers)
    x = torch.randn(3, 128)
    assert torch.equal(*(layer(x) for layer in layers))
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), states[1][name].reshape(-1).view(torch.uint8)), name
    save_file(exported, tmp_path / "single.safetensors")
    assert ModelFolder.open(tmp_path / "single.safetensors", base=ours.path).is_packed


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({f"{LAYER}.pre_quant_scale": torch.ones(128)}, "scaled inputs, as AWQ and SVDQuant"),
        ({f"{LAYER}.weight_scale": torch.ones(1, 8)}, r"expected weight_scale \[64, 8\], torch.float8_e4m3fn"),
        ({f"{LAYER}.weight_scale_2": torch.ones(2)}, "weight_scale_2 has 2 values, expected 1"),
        ({f"{LAYER}.comfy_quant": torch.ones(3, dtype=torch.uint8)}, "in ComfyUI's own layout of NVFP4"),
        ({f"{LAYER}.weight": torch.ones(64, 64, dtype=torch.int8)}, "is torch.int8 with weight_scale, weight_scale_2"),
    ],
)
def test_layers_that_would_be_read_wrongly_are_refused(extra: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    save_file({**as_modelopt(official.transformer().state_dict()), **extra}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_weights(tmp_path / "x.safetensors")


def test_scales_of_blocks_are_refused_with_their_shape(tmp_path: Path) -> None:
    scaled, _ = in_fp8(official.transformer().state_dict(), "weight_scale")
    save_file({**scaled, f"{LAYER}.weight_scale": torch.ones(2, 3)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.weight \[64, 128\] has scales \[2, 3\]"):
        open_weights(tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors").keys() == {*scaled, f"{LAYER}.weight_scale"}
