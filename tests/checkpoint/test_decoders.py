"""Decoders of Wan2.2 latents are recognized by the contents of their files, and others are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longvideo.checkpoint import names, pickle_file
from longvideo.checkpoint.decoders import LatentScale, StoredDecoder, open_decoder
from longvideo.checkpoint.modules import OnMeta
from longvideo.errors import CheckpointError, UserError
from longvideo.streaming.decoder import StreamingDecoder
from longvideo.streaming.decoder_convolutions import Grid
from longvideo.vae.autoencoder import Autoencoder, DecodingAutoencoder
from longvideo.vae.config import AutoencoderConfig
from longvideo.vae.tae import TinyDecoder, TinyEncoder, TinyForm
from tests import tae
from tests.checkpoint import official, small
from tests.checkpoint.random_weights import weights_of
from tests.decoder_files import SMALL, save, tiny_weights

WAN22 = AutoencoderConfig.wan22()
PRUNED = replace(WAN22, base_dim=8, decoder_base_dim=12)


def latents(num_frames: int = 2) -> Tensor:
    return torch.randn(1, 48, num_frames, 2, 3, generator=torch.Generator().manual_seed(0))


def pruned() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(PRUNED).eval()


def decoded(stored: StoredDecoder, latents_BCTHW: Tensor) -> Tensor:
    """Return the video of normalized latents."""
    module = stored.load_decoder()
    if isinstance(module, TinyDecoder):
        return module.decode(latents_BCTHW)[0]
    return module.decode(module.denormalize(latents_BCTHW))[0]


@pytest.mark.parametrize("form", ["base", "super"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@torch.inference_mode()
def test_published_shapes_are_recognized(form: TinyForm, suffix: str, tmp_path: Path) -> None:
    name = "taew2_2" if form == "base" else "taew2_2_super"
    weights = {key: tensor.half() for key, tensor in tae.weights(form).items()}
    stored = open_decoder(save(tmp_path / f"{name}{suffix}", weights), WAN22)
    assert (stored.kind, stored.missing) == ("TAEW2.2" if form == "base" else "TAEW2.2 super", ())
    assert stored.config == tae.CONFIGS[form]
    module, coder = stored.load_decoder(dtype=torch.float32), stored.load_encoder()
    expected = tae.decoder(form).half().float().state_dict()
    assert all(torch.equal(module.state_dict()[key], tensor) for key, tensor in expected.items())
    assert module.state_dict().keys() == expected.keys()
    assert isinstance(coder, TinyEncoder) and next(coder.parameters()).dtype == torch.float16


@torch.inference_mode()
def test_lighttae_is_recognized_by_its_name_or_chosen_by_the_caller(tmp_path: Path) -> None:
    weights = tiny_weights()
    normalized = open_decoder(save(tmp_path / "taew2_2.pth", weights), WAN22)
    denormalized = open_decoder(save(tmp_path / "lighttaew2_2.safetensors", weights), WAN22)
    assert (normalized.kind, denormalized.kind) == ("TAEW2.2", "lighttae")
    assert normalized.config == SMALL
    assert denormalized.config == replace(SMALL, latents_mean=WAN22.latents_mean, latents_std=WAN22.latents_std)
    x = latents()
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (WAN22.latents_mean, WAN22.latents_std))
    assert torch.equal(decoded(denormalized, x), decoded(normalized, x * std + mean))
    scales: tuple[LatentScale, ...] = ("normalized", "denormalized")
    other = save(tmp_path / "decoder.pth", weights)
    for scale, expected in zip(scales, (normalized, denormalized), strict=True):
        assert open_decoder(other, WAN22, latents=scale).config == expected.config
    with pytest.raises(CheckpointError, match="decoder.pth is TAEW2.2 or lighttae.*rename it so that"):
        open_decoder(other, WAN22)


@torch.inference_mode()
def test_a_file_without_an_encoder_decodes(tmp_path: Path) -> None:
    stored = open_decoder(save(tmp_path / "taew2_2.pth", tiny_weights(coders=("decoder",))), WAN22)
    assert stored.missing == ("encoder",)
    assert decoded(stored, latents()).shape == (1, 3, 5, 32, 48)
    with pytest.raises(CheckpointError, match="taew2_2.pth has a decoder only; use the encoder of the model"):
        stored.load_encoder()


@torch.inference_mode()
def test_pruned_autoencoders_give_the_frames_of_ours(tmp_path: Path) -> None:
    own = pruned()
    heads = {f"dynamic_feature_projection_heads.up_block_1.{x}": torch.ones(4) for x in ("weight", "bias")}
    content = {
        "state_dict": {"gen_model": {**own.state_dict(), **heads}, "dics_model": {"conv.weight": torch.ones(2)}},
        "optimizer_state": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 1e-4}]},
        "epoch": 7,
    }
    stored = open_decoder(save(tmp_path / "MG-LightVAE.pth", content), WAN22)
    assert (stored.kind, stored.config, stored.missing) == ("pruned Wan2.2 VAE", PRUNED, ())
    x = latents()
    expected, _ = own.decode(own.denormalize(x))
    assert torch.equal(decoded(stored, x), expected)
    coder, video = stored.load_encoder(), torch.rand(1, 3, 5, 32, 32) * 2 - 1
    assert isinstance(coder, Autoencoder) and torch.equal(coder.encode(video)[0], own.encode(video)[0])
    module = stored.load_decoder()
    assert isinstance(module, DecodingAutoencoder)
    with pytest.raises(UserError, match="video of 5 frames cannot be encoded: only the decoder"):
        module.encode(video)


@torch.inference_mode()
def test_the_streaming_decoder_takes_a_decoder_without_its_encoder(tmp_path: Path) -> None:
    own = pruned()
    module = open_decoder(save(tmp_path / "vae.pth", own.state_dict()), WAN22).load_decoder()
    assert isinstance(module, DecodingAutoencoder)
    pair = [StreamingDecoder(x, Grid(1, 1, 2, 3)).decode(latents()) for x in (own, module)]
    assert torch.equal(pair[0], pair[1]) and pair[0].shape == (1, 5, 32, 48, 3)


@pytest.mark.parametrize("naming", ["diffusers", "official"])
@torch.inference_mode()
def test_a_decoder_of_wan_alone_has_the_same_frames(naming: str, tmp_path: Path) -> None:
    own = pruned()
    table = names.autoencoder_official(PRUNED.num_res_blocks)
    weights = {
        name if naming == "diffusers" else table.theirs(name): tensor
        for name, tensor in own.state_dict().items()
        if name.startswith(("decoder.", "post_quant_conv."))
    }
    stored = open_decoder(save(tmp_path / "decoder.safetensors", weights), WAN22)
    assert (stored.kind, stored.missing) == ("pruned Wan2.2 VAE", ("encoder",))
    assert stored.config == replace(PRUNED, base_dim=PRUNED.decoder_base_dim)
    x = latents()
    assert torch.equal(decoded(stored, x), own.decode(own.denormalize(x))[0])


@pytest.mark.parametrize(
    ("width", "kind"), [(256, "Wan2.2 VAE"), (128, "MG-LightVAE"), (64, "MG-LightVAE v2"), (32, "pruned Wan2.2 VAE")]
)
def test_kinds_of_wan_follow_from_their_width(width: int, kind: str, tmp_path: Path) -> None:
    config = replace(WAN22, base_dim=max(1, width * 160 // 256), decoder_base_dim=width)
    with OnMeta():
        module = Autoencoder(config)
    file = tmp_path / "vae.pth"
    pickle_file.write_structure(file, weights_of(module, torch.bfloat16), within=("state_dict", "gen_model"))
    stored = open_decoder(file, WAN22)
    assert (stored.kind, stored.config) == (kind, config)


def test_a_decoder_of_the_models_own_latents_opens(tmp_path: Path) -> None:
    config = replace(SMALL, z_dim=4)
    stored = open_decoder(save(tmp_path / "x.pth", tiny_weights(config)), small.VAE, latents="denormalized")
    assert stored.config == replace(config, latents_mean=small.VAE.latents_mean, latents_std=small.VAE.latents_std)


def wan21() -> dict[str, Tensor]:
    return {
        "conv2.weight": torch.zeros(16, 16, 1, 1, 1),
        "decoder.head.0.gamma": torch.ones(96, 1, 1, 1),
        "decoder.upsamples.0.residual.0.gamma": torch.ones(384, 1, 1, 1),
    }


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "taew2_1.pth": (
        tiny_weights(replace(SMALL, z_dim=16, patch_size=1)),
        r"tiny autoencoder of 16 latent channels \(those of Wan2.1.*expected the 48 of the model; use Wan2.2_VAE.pth",
    ),
    "Wan2.1_VAE.pth": (wan21(), r"Wan autoencoder of 16 latent channels \(those of Wan2.1.*expected the 48"),
    "taew2_2_channels.pth": (tiny_weights(replace(SMALL, z_dim=20)), "of 20 latent channels; expected the 48"),
    "taew2_2_patch.pth": (tiny_weights(replace(SMALL, patch_size=1)), "to 4 frames of 8 x 8 pixels; expected 4 of 16"),
    "dit.safetensors": (official.transformer().state_dict(), "is not a decoder: it has the weights of a transformer"),
    "text.pth": ({"shared.weight": torch.ones(4, 2)}, "is not a decoder: it has the weights of a text encoder; use"),
    "other.safetensors": ({"layer.weight": torch.ones(2)}, r"is not a decoder: its tensors \(layer.weight, ...\) bel"),
    "taew2_2_lost.pth": (
        {name: x for name, x in tiny_weights().items() if name != "decoder.13.conv.weight"},
        "has no decoder.stages.1.grow.weight, which every such model has",
    ),
    "taew2_2_shape.pth": (
        {**tiny_weights(), "decoder.22.bias": torch.zeros(11)},
        r"does not fit the model: 1 wrongly shaped: head.1.bias \[11\], expected \[12\]",
    ),
    "taew2_2_wide.pth": (
        {**tiny_weights(), "decoder.22.weight": torch.zeros(12, 0, 3, 3)},
        r"decoder.head.1.weight has shape \[12, 0, 3, 3\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused(name: str, tmp_path: Path) -> None:
    weights, message = REFUSED[name]
    file = save(tmp_path / name, weights)
    with pytest.raises(CheckpointError, match=message) as error:
        open_decoder(file, WAN22)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_files_are_refused(suffix: str, tmp_path: Path) -> None:
    file = save(tmp_path / f"taew2_2{suffix}", tiny_weights())
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match="is truncated") as error:
        open_decoder(file, WAN22)
    assert "\n" not in str(error.value)


def test_nan_is_refused_when_loaded(tmp_path: Path) -> None:
    weights = tiny_weights()
    weights["decoder.22.bias"][3] = torch.nan
    stored = open_decoder(save(tmp_path / "taew2_2.pth", weights), WAN22)
    with pytest.raises(CheckpointError, match="taew2_2.pth: head.1.bias contains NaN or infinity"):
        stored.load_decoder()


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no weight file .*taew2_2.pth"):
        open_decoder(tmp_path / "taew2_2.pth", WAN22)
