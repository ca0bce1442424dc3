"""Files of small decoders with random weights, under the names of public files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from longvideo.checkpoint import names
from longvideo.vae.tae import TinyAutoencoderConfig, TinyDecoder, TinyEncoder

SMALL = TinyAutoencoderConfig("base", z_dim=48, decoder_widths=(8, 6, 4, 4), encoder_width=4)
CODERS = ("decoder", "encoder")


def tiny_weights(config: TinyAutoencoderConfig = SMALL, *, coders: tuple[str, ...] = CODERS) -> dict[str, Tensor]:
    """Return random weights of a tiny autoencoder under TAEHV's names."""
    torch.manual_seed(0)
    modules = {"decoder": TinyDecoder(config), "encoder": TinyEncoder(config)}
    tables = {"decoder": names.TINY_DECODERS[config.form], "encoder": names.TINY_ENCODER}
    return {
        tables[coder].theirs(f"{coder}.{name}"): tensor
        for coder in coders
        for name, tensor in modules[coder].state_dict().items()
    }


def save(file: Path, weights: Mapping[str, Any]) -> Path:
    """Write weights as the suffix of the file states; return the file."""
    if file.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file)
    else:
        torch.save(dict(weights), file)
    return file
