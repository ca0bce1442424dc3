"""The tables of official names and diffusers' names."""

from __future__ import annotations

import pytest
import torch

from longvideo.checkpoint.modules import OnMeta, own_tensors
from longvideo.checkpoint.names import (
    TEXT_ENCODER_OFFICIAL,
    NameTable,
    autoencoder_official,
    official_naming,
    strip_wrappers,
    to_diffusers,
    to_official,
)
from longvideo.errors import CheckpointError
from longvideo.model.config import PRESETS
from longvideo.model.transformer import CausalTransformer
from longvideo.text.umt5 import UMT5Encoder
from longvideo.vae.autoencoder import Autoencoder
from longvideo.vae.config import AutoencoderConfig
from tests import golden
from tests.checkpoint.random_weights import UMT5_XXL

# structure of wan/modules/vae2_2.py and t5.py of github.com/Wan-Video/Wan2.2
RESIDUAL = {"residual.0.gamma", *(f"residual.{i}.{x}" for i in (2, 6) for x in ("weight", "bias")), "residual.3.gamma"}
SHORTCUT = {"shortcut.weight", "shortcut.bias"}
CONV = ("weight", "bias")


def test_every_parameter_of_the_5b_maps_once_onto_diffusers() -> None:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    config = PRESETS["wan2.2-ti2v-5b"]
    with OnMeta():
        ours = CausalTransformer(config)
    with torch.device("meta"):
        theirs = WanTransformer3DModel(
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
        )
    translated = {to_diffusers(name): tensor.shape for name, tensor in ours.state_dict().items()}
    assert len(translated) == len(ours.state_dict()) == 825
    assert translated == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert sum(shape.numel() for shape in translated.values()) == pytest.approx(4.9998e9, rel=1e-4)
    assert [to_official(to_diffusers(name)) for name in ours.state_dict()] == list(ours.state_dict())


def official_autoencoder_names() -> set[str]:
    """List the parameters of Wan2.2's own autoencoder, with 2 residual blocks per level, and 3 in the decoder."""
    result = {f"{conv}.{x}" for conv in ("conv1", "conv2") for x in CONV}
    for coder, levels, blocks, widens, times in (
        ("encoder", "downsamples", 2, (1, 2), (1, 2)),
        ("decoder", "upsamples", 3, (2, 3), (0, 1)),
    ):
        result |= {f"{coder}.conv1.{x}" for x in CONV} | {f"{coder}.head.2.{x}" for x in CONV}
        result |= {f"{coder}.head.0.gamma", f"{coder}.middle.1.norm.gamma"}
        result |= {f"{coder}.middle.1.{conv}.{x}" for conv in ("to_qkv", "proj") for x in CONV}
        result |= {f"{coder}.middle.{i}.{name}" for i in (0, 2) for name in RESIDUAL}
        for level in range(4):
            prefix = f"{coder}.{levels}.{level}.{levels}"
            result |= {f"{prefix}.{block}.{name}" for block in range(blocks) for name in RESIDUAL}
            result |= {f"{prefix}.0.{name}" for name in SHORTCUT if level in widens}
            result |= {f"{prefix}.{blocks}.resample.1.{x}" for x in CONV if level < 3}
            result |= {f"{prefix}.{blocks}.time_conv.{x}" for x in CONV if level in times}
    return result


def official_text_encoder_names() -> set[str]:
    own = {
        "norm1",
        "norm2",
        "pos_embedding.embedding",
        "ffn.gate.0",
        "ffn.fc1",
        "ffn.fc2",
        *(f"attn.{x}" for x in "qkvo"),
    }
    blocks = {f"blocks.{i}.{name}.weight" for i in range(24) for name in own}
    return {"token_embedding.weight", "norm.weight", *blocks}


def test_every_parameter_of_the_autoencoder_maps_once_onto_the_official_one() -> None:
    with OnMeta():
        ours = Autoencoder(AutoencoderConfig.wan22()).state_dict()
    _check_table(autoencoder_official(2), set(ours), official_autoencoder_names(), num_parameters=196)


def test_every_parameter_of_the_text_encoder_maps_once_onto_the_official_one() -> None:
    with OnMeta():
        ours = own_tensors(UMT5Encoder(UMT5_XXL))
    _check_table(TEXT_ENCODER_OFFICIAL, set(ours), official_text_encoder_names(), num_parameters=242)


def _check_table(table: NameTable, ours: set[str], theirs: set[str], *, num_parameters: int) -> None:
    assert len(ours) == num_parameters
    assert {table.theirs(name) for name in ours} == theirs
    assert {table.ours(name) for name in theirs} == ours
    assert all(table.ours(table.theirs(name)) == name for name in ours)


def test_the_two_affine_norms_swap_numbers() -> None:
    assert to_diffusers("blocks.7.norm3.bias") == "blocks.7.norm2.bias"
    assert to_official("blocks.7.norm2.bias") == "blocks.7.norm3.bias"


@pytest.mark.parametrize(
    "name",
    [
        "model.blocks.0.ffn.0.weight",
        "model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.ffn.0.weight",
        "module.model.blocks.0._orig_mod.ffn.0.weight",
        "blocks.0._checkpoint_wrapped_module.ffn.0.weight",
        "_fsdp_wrapped_module.model.blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.ffn.0.weight",
        "module._orig_mod.model.blocks.0._checkpoint_wrapped_module._fsdp_wrapped_module._orig_mod.ffn.0.weight",
    ],
)
def test_wrappers_of_training_are_dropped(name: str) -> None:
    assert strip_wrappers(name) == "blocks.0.ffn.0.weight"


def test_the_reference_checkpoint_reads_as_official_and_diffusers_as_diffusers() -> None:
    stored = golden.load("causal_a.weights")
    expected = set(golden.model().state_dict())
    official = official_naming(stored)
    assert {official(name) for name in stored} == expected
    diffusers = [to_diffusers(name) for name in expected]
    assert {official_naming(diffusers)(name) for name in diffusers} == expected


def test_a_foreign_checkpoint_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"2 tensors \(a, b, ...\) are not those of a Wan transformer"):
        official_naming(["a", "b"])
