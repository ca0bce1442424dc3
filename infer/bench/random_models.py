"""Models with random weights, to measure speed, which does not depend on the values of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.errors import UserError
from longvideo.infer.bench.step import random_model
from longvideo.infer.decoder_choice import with_decoder_precision
from longvideo.infer.encode import FrameEncoder
from longvideo.infer.generation import Models
from longvideo.quantization.convert import with_precision
from longvideo.quantization.number_formats import FP8_FORMATS
from longvideo.streaming.decoders import DecoderConfig, DecoderModel, TinyDecoderModel, WanDecoderModel
from longvideo.vae.autoencoder import Autoencoder
from longvideo.vae.tae import TinyAutoencoderConfig, TinyDecoder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longvideo.infer.fit.placement import Placement
    from longvideo.infer.fit.shapes import ModelShapes
    from longvideo.quantization.number_formats import NumberFormats


def random_models(shapes: ModelShapes, placement: Placement, *, formats: NumberFormats) -> Models:
    """Return models of these shapes with random weights. The features of prompts are random, too."""
    config, device = shapes.transformer, placement.device
    formats = with_decoder_precision(formats.effective(packed=False), shapes.decoder_config, placement)
    transformer = random_model(config, device, placement.denoise_dtype)
    transformer = with_precision(transformer, formats.precision_of(packed=False))
    decoder = _random_decoder(shapes.decoder_config, placement, formats)
    return Models(
        transformer=transformer.eval().requires_grad_(False),
        decoder=decoder,
        encoder=FrameEncoder(_no_encoder),
        text_encoder=_RandomText(config.text_len, config.text_dim, device),
        settings=shapes.settings,
        spec=shapes.spec,
        placement=placement,
        formats=formats,
    )


def _random_decoder(config: DecoderConfig, placement: Placement, formats: NumberFormats) -> DecoderModel:
    dtype, name = placement.decoder_dtype(formats.decoder), "random weights"
    with torch.device(placement.decode_device):
        network = TinyDecoder(config) if isinstance(config, TinyAutoencoderConfig) else Autoencoder(config)
    network = network.to(dtype).eval().requires_grad_(False)
    if isinstance(network, TinyDecoder):
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        return TinyDecoderModel(network, name=name)
    return WanDecoderModel(network, name=name, fp8=formats.decoder in FP8_FORMATS)


def _no_encoder() -> Autoencoder:
    raise UserError("random models encode no frames; leave the picture or the video out")


class _RandomText:
    """A text encoder with random features for each prompt."""

    def __init__(self, length: int, dim: int, device: torch.device) -> None:
        self._shape, self._device = (length, dim), device

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        features = torch.randn(len(prompts), *self._shape, generator=torch.Generator().manual_seed(0))
        return features.to(self._device), torch.arange(len(prompts), device=self._device)

    def unknown_words(self, prompt: str) -> list[str]:  # noqa: ARG002 - the name is that of the protocol
        return []
