"""Random weights of any size, which are drawn when they are read, and fingerprints of weights, in little memory."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.modules import OnMeta, own_tensors
from longvideo.checkpoint.parts import ModelPart, PartConfig
from longvideo.checkpoint.settings import ModelSettings
from longvideo.checkpoint.stored_tokenizer import TokenizerFolder
from longvideo.checkpoint.tensors import PIECE_BYTES, TensorInfo, Weights, as_bytes
from longvideo.model.config import TransformerConfig
from longvideo.model.transformer import CausalTransformer
from longvideo.text.umt5 import UMT5Config, UMT5Encoder
from longvideo.vae.autoencoder import Autoencoder
from longvideo.vae.config import AutoencoderConfig

UMT5_XXL = UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)


@dataclass(frozen=True)
class Random:
    """Normally distributed values that depend on the tensor's name and the index."""

    info: TensorInfo
    name: str

    def pieces(self) -> Iterator[Tensor]:
        pool = _pool()
        seed = zlib.crc32(self.name.encode())
        step, done, number = PIECE_BYTES // self.info.dtype.itemsize, 0, 0
        while done < self.info.num_values:
            count = min(step, self.info.num_values - done)
            start = (seed + 7919 * number) % (len(pool) - count)
            yield pool[start : start + count].to(self.info.dtype)
            done, number = done + count, number + 1


def weights_of(module: nn.Module, dtype: torch.dtype) -> Weights:
    """Draw weights for a module on the meta device."""
    infos = {name: TensorInfo(tuple(tensor.shape), dtype) for name, tensor in own_tensors(module).items()}
    return Weights({name: Random(info, name) for name, info in infos.items()})


def random_model(
    transformer: TransformerConfig,
    vae: AutoencoderConfig,
    text_encoder: UMT5Config,
    *,
    settings: ModelSettings,
    tokenizer: Path,
) -> ModelFolder:
    """Return a model without files: transformer and text encoder in bf16, autoencoder in fp32, as in Wan's files."""
    with OnMeta():
        built: dict[str, tuple[nn.Module, PartConfig, torch.dtype]] = {
            "transformer": (CausalTransformer(transformer), transformer, torch.bfloat16),
            "vae": (Autoencoder(vae), vae, torch.float32),
            "text_encoder": (UMT5Encoder(text_encoder), text_encoder, torch.bfloat16),
        }
    stored = {
        name: ModelPart(type(module).__name__, weights_of(module, dtype), config)
        for name, (module, config, dtype) in built.items()
    }
    return ModelFolder(Path("random"), "random", settings, stored, TokenizerFolder(tokenizer))


def fingerprints(model: ModelFolder) -> dict[str, str]:
    """Return a hash of every tensor of a model, with its shape and dtype."""
    result = {}
    for part in model.parts:
        for name, tensor in model.weights(part).tensors.items():
            digest = hashlib.blake2b(f"{tensor.info}".encode(), digest_size=16)
            for piece in tensor.pieces():
                digest.update(as_bytes(piece))
            result[f"{part}/{name}"] = digest.hexdigest()
    return result


@cache
def _pool() -> Tensor:
    return torch.randn(2 * PIECE_BYTES // 2 + 104729, generator=torch.Generator().manual_seed(0)) * 0.02
