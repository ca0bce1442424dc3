"""`save_decoder` writes what `open_decoder` reads; the header states the scale of the latents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from longvideo.checkpoint.decoders import open_decoder, save_decoder
from longvideo.errors import CheckpointError
from longvideo.vae.config import AutoencoderConfig
from longvideo.vae.tae import TinyAutoencoderConfig, TinyDecoder

VAE = AutoencoderConfig.tiny()
SHAPE = TinyAutoencoderConfig("base", z_dim=24, decoder_widths=(8, 6, 4, 4))
MEAN, STD = tuple(0.1 * i for i in range(24)), tuple(1 + 0.1 * i for i in range(24))


def decoder(shape: TinyAutoencoderConfig = SHAPE) -> TinyDecoder:
    torch.manual_seed(0)
    return TinyDecoder(shape).eval()


def latents() -> torch.Tensor:
    return torch.randn(1, 24, 3, 2, 3, generator=torch.Generator().manual_seed(0))


def test_an_exported_decoder_opens_with_the_same_pixels(tmp_path: Path) -> None:
    save_decoder(tmp_path, "decoder", decoder(), model="tiny", dtype=torch.float32)
    with safe_open(tmp_path / "decoder.safetensors", framework="pt") as file:
        metadata = file.metadata()
        assert "decoder.1.weight" in file.keys() and "decoder.22.weight" in file.keys()  # noqa: SIM118
    assert metadata == {"format": "pt", "kind": "distilled decoder", "latents": "normalized", "model": "tiny"}
    stored = open_decoder(tmp_path / "decoder.safetensors", VAE)
    assert (stored.kind, stored.config, stored.missing) == ("distilled decoder", SHAPE, ("encoder",))
    loaded = stored.load_decoder()
    assert torch.equal(loaded.decode(latents())[0], decoder().decode(latents())[0])


def test_the_header_states_denormalized_latents(tmp_path: Path) -> None:
    vae = replace(VAE, latents_mean=MEAN, latents_std=STD)
    own = decoder(replace(SHAPE, latents_mean=MEAN, latents_std=STD))
    # the name of the file would state normalized latents
    save_decoder(tmp_path, "taew2_2", own, model="tiny", dtype=torch.float32)
    stored = open_decoder(tmp_path / "taew2_2.safetensors", vae)
    assert isinstance(stored.config, TinyAutoencoderConfig) and not stored.config.takes_normalized
    assert torch.equal(stored.load_decoder().decode(latents())[0], own.decode(latents())[0])
    explicit = open_decoder(tmp_path / "taew2_2.safetensors", vae, latents="normalized").config
    assert isinstance(explicit, TinyAutoencoderConfig) and explicit.takes_normalized


def test_an_unknown_scale_in_the_header_is_refused(tmp_path: Path) -> None:
    save_decoder(tmp_path, "decoder", decoder(), model="tiny", dtype=torch.float32)
    file = tmp_path / "decoder.safetensors"
    save_file(load_file(file), file, metadata={"latents": "squared"})
    with pytest.raises(CheckpointError, match="latents='squared' in its header; expected normalized or denormalized"):
        open_decoder(file, VAE)
