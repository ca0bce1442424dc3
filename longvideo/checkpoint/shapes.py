"""Derive a model's configuration from the shapes of its tensors, for files without a configuration."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from longvideo.errors import CheckpointError
from longvideo.model.config import TransformerConfig
from longvideo.quantization.linear import CODES
from longvideo.text.umt5 import UMT5Config
from longvideo.vae.config import WAN22_LATENTS_MEAN, WAN22_LATENTS_STD, AutoencoderConfig
from longvideo.vae.tae import COLORS, TinyAutoencoderConfig, TinyForm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from longvideo.checkpoint.tensors import TensorInfo, Weights

HEAD_DIM = 128
"""Head dimension of every published Wan transformer; it cannot be derived from shapes."""
STAGE_INPUT: dict[TinyForm, str] = {"base": "grow", "super": "conv"}
"""Layer of a stage of the tiny decoder whose inputs have the stage's width."""


def transformer_config(weights: Weights, *, text_len: int, head_dim: int = HEAD_DIM) -> TransformerConfig:
    """Derive the configuration of a transformer.

    weights: under official names, packed or not. text_len: prompt positions, tokens. Raises CheckpointError if a tensor
    is missing or has a wrong number of axes.
    """
    shapes = _Shapes(weights)
    dim, in_channels, *patch = shapes.of("patch_embedding.weight", 5)
    if dim % head_dim:
        raise CheckpointError(
            f"{weights.label} has width {dim}, which is not a multiple of {head_dim}, so its number of heads is"
            " unknown; use --base with a model folder of the same shape"
        )
    return TransformerConfig(
        num_attention_heads=dim // head_dim,
        attention_head_dim=head_dim,
        in_channels=in_channels,
        out_channels=shapes.of("head.head.weight", 2)[0] // math.prod(patch),
        text_dim=text_dim(weights),
        ffn_dim=shapes.of("blocks.0.ffn.0.weight", 2)[0],
        num_layers=shapes.count("blocks.", 1),
        freq_dim=shapes.of("time_embedding.0.weight", 2)[1],
        text_len=text_len,
        patch_size=(patch[0], patch[1], patch[2]),
    )


def text_dim(weights: Weights) -> int:
    """Return the width of a transformer's text features. weights: under official names."""
    return _Shapes(weights).of("text_embedding.0.weight", 2)[1]


def autoencoder_config(weights: Weights, like: AutoencoderConfig | None = None) -> AutoencoderConfig:
    """Derive the configuration of an autoencoder, or of its decoder if the weights have no encoder.

    weights: under diffusers' names. like: an autoencoder of the same latents, which provides their mean and deviation;
    weight files do not store these, so without it only the 48 channels of Wan2.2 are supported. Without an encoder,
    base_dim is that of the decoder. Raises CheckpointError.
    """
    shapes = _Shapes(weights)
    z_dim = shapes.of("post_quant_conv.weight", 5)[0]
    mean, std = (WAN22_LATENTS_MEAN, WAN22_LATENTS_STD) if like is None else (like.latents_mean, like.latents_std)
    if z_dim != len(mean):
        raise CheckpointError(
            f"{weights.label} has {z_dim} latent channels, and a weight file does not store the statistics of latents;"
            f" expected {len(mean)} channels; use a model folder with a config.json"
        )
    out_channels = shapes.of("decoder.conv_out.weight", 5)[0]
    if any(name.startswith("encoder.") for name in weights.infos):
        blocks, resampler, more_blocks = "encoder.down_blocks", "downsampler", 0
        levels = range(shapes.count(f"{blocks}.", 2))
        base, in_channels = shapes.of("encoder.conv_in.weight", 5)[:2]
        resampled = levels[:-1]
    else:
        # the decoder lists the levels from the lowest resolution, and has one block more in each
        blocks, resampler, more_blocks = "decoder.up_blocks", "upsampler", 1
        levels = range(shapes.count(f"{blocks}.", 2))[::-1]
        base, in_channels = shapes.of(f"{blocks}.{levels[0]}.resnets.0.conv1.weight", 5)[0], out_channels
        resampled = levels[1:]
    widths = [shapes.of(f"{blocks}.{i}.resnets.0.conv1.weight", 5)[0] for i in levels]
    patch = math.isqrt(in_channels // COLORS)
    halves_time = tuple(f"{blocks}.{i}.{resampler}.time_conv.weight" in weights.infos for i in resampled)
    return AutoencoderConfig(
        base_dim=base,
        decoder_base_dim=shapes.of("decoder.conv_in.weight", 5)[0] * base // widths[-1],
        z_dim=z_dim,
        dim_mult=tuple(width // base for width in widths),
        num_res_blocks=shapes.count(f"{blocks}.0.resnets.", 4) - more_blocks,
        temperal_downsample=halves_time,
        latents_mean=mean,
        latents_std=std,
        is_residual=True,
        in_channels=in_channels,
        out_channels=out_channels,
        patch_size=patch,
        scale_factor_spatial=patch * 2 ** (len(levels) - 1),
        scale_factor_temporal=2 ** sum(halves_time),
    )


def tiny_autoencoder_config(weights: Weights) -> TinyAutoencoderConfig:
    """Derive the configuration of a tiny autoencoder of normalized latents.

    weights: under this project's names, "decoder.*" and, if there is an encoder, "encoder.*". Raises CheckpointError.
    """
    shapes = _Shapes(weights)
    form: TinyForm = "base" if "decoder.stem.1.weight" in weights.infos else "super"
    stem = shapes.of("decoder.stem.1.weight" if form == "base" else "decoder.stem.0.weight", 4)
    head = shapes.of("decoder.head.1.weight" if form == "base" else "decoder.head.0.weight", 4)
    middle = [shapes.of(f"decoder.stages.{stage}.{STAGE_INPUT[form]}.weight", 4)[1] for stage in (1, 2)]
    has_encoder = any(name.startswith("encoder.") for name in weights.infos)
    encoder_width = shapes.of("encoder.stem.0.weight", 4)[0] if has_encoder else TinyAutoencoderConfig.encoder_width
    return TinyAutoencoderConfig(
        form,
        z_dim=stem[1],
        decoder_widths=(stem[0], middle[0], middle[1], head[1]),
        patch_size=math.isqrt(head[0] // COLORS),
        encoder_width=encoder_width,
    )


def text_encoder_config(weights: Weights) -> UMT5Config:
    """Derive the configuration of a text encoder. weights: under transformers' names. Raises CheckpointError."""
    shapes = _Shapes(weights)
    vocab_size, d_model = shapes.of("shared.weight", 2)
    attention = "encoder.block.0.layer.0.SelfAttention"
    num_buckets, num_heads = shapes.of(f"{attention}.relative_attention_bias.weight", 2)
    return UMT5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=shapes.of(f"{attention}.q.weight", 2)[0] // num_heads,
        d_ff=shapes.of("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 2)[0],
        num_layers=shapes.count("encoder.block.", 2),
        num_heads=num_heads,
        relative_attention_num_buckets=num_buckets,
    )


class _Shapes:
    def __init__(self, weights: Weights) -> None:
        self.label = weights.label
        self.infos: Mapping[str, TensorInfo] = weights.infos

    def of(self, name: str, num_axes: int) -> tuple[int, ...]:
        """Return the shape of a tensor, which may be the weight of a packed layer."""
        codes = f"{name.removesuffix('weight')}{CODES}"
        if name not in self.infos and codes in self.infos and num_axes == len(self.infos[codes].shape):
            *rows, half = self.infos[codes].shape
            return (*rows, 2 * half)
        if name not in self.infos:
            raise CheckpointError(f"{self.label} has no {name}, which every such model has; copy or download it again")
        shape = self.infos[name].shape
        if len(shape) != num_axes or 0 in shape:
            raise CheckpointError(f"{self.label}: {name} has shape {list(shape)}, expected {num_axes} axes")
        return shape

    def count(self, prefix: str, part: int) -> int:
        """Count the distinct numbers at one dotted part of the names with a prefix."""
        numbers = {name.split(".")[part] for name in self.infos if name.startswith(prefix)}
        if not numbers:
            raise CheckpointError(f"{self.label} has no tensors {prefix}0 and so on; copy or download it again")
        return len(numbers)
