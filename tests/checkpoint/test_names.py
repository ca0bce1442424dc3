"""The tables between official and diffusers names."""

from __future__ import annotations

import pytest
import torch

from longvideo.checkpoint.names import official_naming, strip_wrappers, to_diffusers, to_official
from longvideo.checkpoint.tensors import OnMeta
from longvideo.errors import CheckpointError
from longvideo.model.config import PRESETS
from longvideo.model.transformer import CausalTransformer
from tests import golden


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


def test_the_two_affine_norms_swap_numbers() -> None:
    assert to_diffusers("blocks.7.norm3.bias") == "blocks.7.norm2.bias"
    assert to_official("blocks.7.norm2.bias") == "blocks.7.norm3.bias"


@pytest.mark.parametrize(
    "name",
    [
        "model.blocks.0.ffn.0.weight",
        "model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.ffn.0.weight",
        "module.model.blocks.0._orig_mod.ffn.0.weight",
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
    with pytest.raises(CheckpointError, match=r"2 tensors \(a, b, ...\) are no Wan transformer"):
        official_naming(["a", "b"])
