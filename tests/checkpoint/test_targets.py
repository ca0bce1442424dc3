"""The layouts of other programs hold the same numbers, and come back as the same model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longvideo.checkpoint.conversion import ConversionOptions, convert_model
from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.names import to_diffusers
from longvideo.checkpoint.packed import PACKED_LEAVES
from longvideo.errors import CheckpointError, UserError
from longvideo.infer.fit.placement import Placement
from longvideo.infer.loading import load_transformer
from longvideo.kernels.fp8.reference import quantize_rows
from longvideo.kernels.nvfp4.format import Rule
from longvideo.model.transformer import CausalTransformer
from longvideo.quantization.fp8 import FP8Linear
from longvideo.quantization.number_formats import NumberFormats
from longvideo.vae.autoencoder import Autoencoder
from tests.checkpoint import official, small
from tests.checkpoint.random_weights import fingerprints

MODELOPT_LEAVES = ("weight", "weight_scale", "weight_scale_2")
LAYER = "blocks.1.ffn.0"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return official.save(tmp_path_factory.mktemp("models") / "ours")


@pytest.mark.parametrize("rule", [Rule.STATIC6, Rule.ADAPTIVE])
def test_the_layout_of_modelopt_has_our_codes_and_scales_and_comes_back_bit_for_bit(
    rule: Rule, ours: ModelFolder, tmp_path: Path
) -> None:
    convert_model(ours, tmp_path / "packed", ConversionOptions(precision="nvfp4", rule=rule, keep=("blocks.0.*",)))
    packed = ModelFolder.open(tmp_path / "packed")
    convert_model(packed, tmp_path / "modelopt", ConversionOptions("modelopt"))
    folder = tmp_path / "modelopt" / "transformer"
    exported = load_file(folder / "diffusion_pytorch_model.safetensors")
    for ours_leaf, leaf in zip(PACKED_LEAVES, MODELOPT_LEAVES, strict=True):
        own, other = (
            packed.weights("transformer").read(f"{LAYER}.{ours_leaf}"),
            exported[to_diffusers(f"{LAYER}.{leaf}")],
        )
        assert own.dtype == other.dtype and torch.equal(
            own.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
        )
    for name in ("config.json", "hf_quant_config.json"):
        values = json.loads((folder / name).read_text())
        values = values["quantization_config"] if name == "config.json" else values["quantization"]
        assert values["quant_algo"] == "W4A16_NVFP4"
        ignored = values.get("ignore") or values["exclude_modules"]
        assert "proj_out" in ignored and "blocks.0.attn1.to_q" in ignored and "blocks.1.attn1.to_q" not in ignored
    assert ModelFolder.open(tmp_path / "modelopt").settings == ours.settings
    convert_model(ModelFolder.open(tmp_path / "modelopt"), tmp_path / "back", ConversionOptions())
    assert fingerprints(ModelFolder.open(tmp_path / "back")) == fingerprints(packed)


@pytest.fixture(scope="module")
def in_fp8(ours: ModelFolder) -> ModelFolder:
    folder = ours.path.parent / "fp8"
    convert_model(ours, folder, ConversionOptions("modelopt", "fp8"))
    return ModelFolder.open(folder)


def exported_bytes(model: ModelFolder) -> dict[str, Tensor]:
    tensors = load_file(model.path / "transformer" / "diffusion_pytorch_model.safetensors")
    return {name: tensor.reshape(-1).view(torch.uint8) for name, tensor in tensors.items()}


def test_fp8_has_a_scale_for_each_row_and_none_for_inputs_as_modelopt_documents(
    ours: ModelFolder, in_fp8: ModelFolder
) -> None:
    folder = in_fp8.path / "transformer"
    exported = load_file(folder / "diffusion_pytorch_model.safetensors")
    rows = quantize_rows(ours.weights("transformer").read(f"{LAYER}.weight").bfloat16())
    values, scales = (exported[to_diffusers(f"{LAYER}.{leaf}")] for leaf in ("weight", "weight_scale"))
    assert values.dtype == torch.float8_e4m3fn and torch.equal(values.view(torch.uint8), rows.values.view(torch.uint8))
    assert scales.dtype == torch.float32 and scales.shape == (64,) and torch.equal(scales, rows.scales)
    assert not any(name.endswith("input_scale") for name in exported)
    assert exported["proj_out.weight"].dtype == torch.bfloat16
    for name in ("config.json", "hf_quant_config.json"):
        description = json.loads((folder / name).read_text())
        description = description["quantization_config" if name == "config.json" else "quantization"]
        assert description["quant_algo"] == "FP8_PER_CHANNEL_PER_TOKEN"
        ignored = description.get("ignore") or description["exclude_modules"]
        assert "proj_out" in ignored and "blocks.1.attn1.to_q" not in ignored


@torch.no_grad()
def test_fp8_gives_our_forward_and_keeps_codes_and_scales_when_it_is_exported_again(
    ours: ModelFolder, in_fp8: ModelFolder, tmp_path: Path
) -> None:
    placement = Placement(CPU, CPU, dtype=torch.bfloat16)
    models = [load_transformer(model, placement, NumberFormats("fp8-emulated")) for model in (ours, in_fp8)]
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), states[1][name].reshape(-1).view(torch.uint8)), name
    layers = [model.get_submodule(LAYER) for model in models]
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert all(isinstance(layer, FP8Linear) for layer in layers) and torch.equal(*(layer(x) for layer in layers))
    convert_model(in_fp8, tmp_path / "again", ConversionOptions("modelopt"))
    once, twice = exported_bytes(in_fp8), exported_bytes(ModelFolder.open(tmp_path / "again"))
    assert once.keys() == twice.keys() and all(torch.equal(once[name], twice[name]) for name in once)


def test_one_scale_of_a_weight_becomes_the_scale_of_each_row_without_rounding(
    ours: ModelFolder, tmp_path: Path
) -> None:
    tensors = ours.load_transformer().state_dict()
    scale = tensors[f"{LAYER}.weight"].abs().amax() / 448
    values = (tensors[f"{LAYER}.weight"] / scale).to(torch.float8_e4m3fn)
    per_tensor = {
        **tensors,
        f"{LAYER}.weight": values,
        f"{LAYER}.weight_scale": scale,
        f"{LAYER}.input_scale": torch.ones(1),
    }
    save_file(per_tensor, tmp_path / "fp8.safetensors")
    source = ModelFolder.open(tmp_path / "fp8.safetensors", base=ours.path)
    convert_model(source, tmp_path / "modelopt", ConversionOptions("modelopt"))
    exported = load_file(tmp_path / "modelopt" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(exported[to_diffusers(f"{LAYER}.weight")].view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(exported[to_diffusers(f"{LAYER}.weight_scale")], scale.expand(64))
    assert [name for name in exported if name.endswith("_scale")] == [to_diffusers(f"{LAYER}.weight_scale")]
    opened = ModelFolder.open(tmp_path / "modelopt").weights("transformer")
    assert torch.equal(opened.read(f"{LAYER}.weight"), values.float() * scale)


def test_fp8_is_refused_where_it_would_be_rounded_again_or_lost(ours: ModelFolder, tmp_path: Path) -> None:
    convert_model(ours, tmp_path / "packed", ConversionOptions(precision="nvfp4"))
    with pytest.raises(CheckpointError, match="packed has packed 4-bit weights; use --precision nvfp4, or the model"):
        convert_model(ModelFolder.open(tmp_path / "packed"), tmp_path / "x", ConversionOptions("modelopt", "fp8"))
    with pytest.raises(UserError, match="longvideo does not store fp8; use --to modelopt"):
        ConversionOptions(precision="fp8")


def test_the_layout_of_modelopt_needs_weights_in_4_or_8_bits(ours: ModelFolder, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no weights in 4 or 8 bits, which this format stores; add"):
        convert_model(ours, tmp_path / "x", ConversionOptions("modelopt"))
    convert_model(ours, tmp_path / "x", ConversionOptions("modelopt", "nvfp4"))
    assert ModelFolder.open(tmp_path / "x").is_packed


@pytest.mark.parametrize("channels", [4, 16, 24])
def test_the_official_layout_holds_models_of_any_size_with_their_statistics(channels: int, tmp_path: Path) -> None:
    torch.manual_seed(2)
    numbers = tuple(0.5 + index / channels for index in range(channels))
    transformer = replace(official.TRANSFORMER, in_channels=channels, out_channels=channels, num_attention_heads=3)
    vae = replace(small.VAE, z_dim=channels, latents_mean=numbers, latents_std=numbers[::-1])
    own = ModelFolder.save(
        tmp_path / "own",
        settings=small.SETTINGS,
        transformer=CausalTransformer(transformer),
        vae=Autoencoder(vae),
        text_encoder=small.text_encoder(),
    )
    convert_model(own, tmp_path / "wan", ConversionOptions("official"))
    opened = ModelFolder.open(tmp_path / "wan")
    assert opened.format == "official Wan folder"
    assert (opened.transformer_config, opened.vae_config) == (own.transformer_config, own.vae_config)
    assert fingerprints(opened) == fingerprints(own)


def test_a_folder_of_wans_own_size_has_no_file_that_wan_has_not(ours: ModelFolder, tmp_path: Path) -> None:
    convert_model(ours, tmp_path / "wan", ConversionOptions("official"))
    assert sorted(file.name for file in (tmp_path / "wan").iterdir()) == [
        "Wan2.2_VAE.pth",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "google",
        "models_t5_umt5-xxl-enc-bf16.pth",
    ]
