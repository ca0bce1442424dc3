"""The layouts of other programs hold the same numbers, and come back as the same model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longvideo.checkpoint.conversion import ConversionOptions, convert_model
from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.names import to_diffusers
from longvideo.checkpoint.packed import PACKED_LEAVES
from longvideo.errors import CheckpointError
from longvideo.kernels.nvfp4.format import Rule
from longvideo.model.transformer import CausalTransformer
from longvideo.vae.autoencoder import Autoencoder
from tests.checkpoint import official, small
from tests.checkpoint.random_weights import fingerprints

MODELOPT_LEAVES = ("weight", "weight_scale", "weight_scale_2")
LAYER = "blocks.1.ffn.0"


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
    convert_model(ModelFolder.open(tmp_path / "modelopt"), tmp_path / "back", ConversionOptions())
    assert fingerprints(ModelFolder.open(tmp_path / "back")) == fingerprints(packed)


def test_the_layout_of_modelopt_needs_packed_weights(ours: ModelFolder, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no packed 4-bit weights, which this format stores; add --precision"):
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
