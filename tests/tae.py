"""Weights, inputs and outputs of the public TAEHV module for Wan2.2 latents, computed in fp32 on a CPU.

The weights are not stored, because a formula of their places gives them; neither are the frames, because torch's
generator does, and of the decoded frames only a corner at the right border of the picture is.
"""

from __future__ import annotations

import json
import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from longvideo.checkpoint.modules import load_weights
from longvideo.checkpoint.names import TINY_DECODERS, TINY_ENCODER
from longvideo.checkpoint.tensors import Weights
from longvideo.vae.tae import TinyAutoencoderConfig, TinyDecoder, TinyEncoder, TinyForm
from tests import golden

SEED = 11
CONFIGS: dict[TinyForm, TinyAutoencoderConfig] = {
    "base": TinyAutoencoderConfig("base", z_dim=48, decoder_widths=(256, 128, 64, 64)),
    "super": TinyAutoencoderConfig("super", z_dim=48, decoder_widths=(512, 256, 128, 64)),
}


@cache
def tensors() -> dict[str, Tensor]:
    return golden.load("taew_a")


def frames() -> Tensor:
    """Return the encoded frames, in [0, 1]. The generator gave the latents first."""
    generator = torch.Generator().manual_seed(SEED)
    latents_NTCHW = torch.randn(1, 5, 48, 4, 6, generator=generator)
    frames_NTCHW = torch.rand(1, 9, 3, 64, 96, generator=generator)
    # processors may round normally distributed values differently
    assert torch.allclose(latents_NTCHW, tensors()["latents_NTCHW"], atol=1e-5)
    assert torch.equal(frames_NTCHW[..., 0, :], tensors()["frames_first_row_NTCW"])
    return frames_NTCHW


def names(form: TinyForm) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights by their public names, sorted."""
    lines = bytes(tensors()[f"{form}.names"].tolist()).decode().splitlines()
    return {name: tuple(json.loads(shape)) for name, shape in (line.split(" ", 1) for line in lines)}


@cache
def weights(form: TinyForm) -> dict[str, Tensor]:
    """Return the weights under their public names."""
    result = {}
    for index, (name, shape) in enumerate(sorted(names(form).items())):
        element = np.arange(1, math.prod(shape) + 1, dtype=np.uint32)
        h = element * np.uint32(2654435761) + np.uint32((index + 1) * 97531 % 2**32)
        h = (h ^ (h >> np.uint32(15))) * np.uint32(2246822519)
        h = (h ^ (h >> np.uint32(13))) * np.uint32(3266489917)
        h = h ^ (h >> np.uint32(16))
        gain = 0.1 if len(shape) == 1 else 1.5 / math.sqrt(math.prod(shape[1:]))
        result[name] = torch.from_numpy((gain * (h / 2**31 - 1)).astype(np.float32)).view(shape)
    result["decoder.22.bias"] += 0.5
    return result


def decoder(form: TinyForm) -> TinyDecoder:
    module = TinyDecoder(CONFIGS[form])
    load_weights(module, _of("decoder.", Weights.of(weights(form)).renamed(TINY_DECODERS[form].ours)))
    return module.eval()


def encoder(form: TinyForm) -> TinyEncoder:
    module = TinyEncoder(CONFIGS[form])
    load_weights(module, _of("encoder.", Weights.of(weights(form)).renamed(TINY_ENCODER.ours)))
    return module.eval()


def _of(prefix: str, stored: Weights) -> Weights:
    return Weights({name.removeprefix(prefix): x for name, x in stored.tensors.items() if name.startswith(prefix)})
