"""Models with random weights, to measure speed, which does not depend on the values of the weights."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.errors import UserError
from longvideo.infer.bench.comparison import PROMPT
from longvideo.infer.bench.random_weights import random_weights
from longvideo.infer.bench.step import random_model
from longvideo.infer.decoder_choice import with_decoder_precision
from longvideo.infer.encode import FrameEncoder
from longvideo.infer.generation import Models
from longvideo.infer.loading import loading_device, place_transformer
from longvideo.infer.script import Script
from longvideo.infer.text_encoder import encode_prompts
from longvideo.quantization.number_formats import FP8_FORMATS
from longvideo.quantization.weights_only import quantize_weights
from longvideo.streaming.decoders import DecoderConfig, DecoderModel, TinyDecoderModel, WanDecoderModel
from longvideo.text.umt5 import POSITION_BIASES, UMT5Encoder
from longvideo.vae.autoencoder import Autoencoder
from longvideo.vae.tae import TinyAutoencoderConfig, TinyDecoder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longvideo.infer.fit.placement import Placement
    from longvideo.infer.fit.shapes import ModelShapes
    from longvideo.quantization.number_formats import NumberFormats
    from longvideo.text.known_prompts import PromptEncoder
    from longvideo.text.umt5 import UMT5Config


def random_models(shapes: ModelShapes, placement: Placement, *, formats: NumberFormats) -> Models:
    """Return models of these shapes with random weights.

    On a GPU a text encoder encodes the prompt of the benchmarks before anything else is drawn, and is freed, as where
    all prompts are known. Without one in the shapes, the features of prompts are random.
    """
    formats = with_decoder_precision(formats.effective(packed=False), shapes.decoder_config, placement)
    text_encoder = _text_encoder(shapes, placement, formats)
    transformer = random_model(shapes.transformer, loading_device(placement), placement.denoise_dtype)
    transformer = place_transformer(transformer, placement, formats.precision_of(packed=False), packed=False)
    return Models(
        transformer=transformer,
        decoder=_random_decoder(shapes.decoder_config, placement, formats),
        encoder=FrameEncoder(_no_encoder, exists=False),
        text_encoder=text_encoder,
        settings=shapes.settings,
        spec=shapes.spec,
        placement=placement,
        formats=formats,
    )


def _text_encoder(shapes: ModelShapes, placement: Placement, formats: NumberFormats) -> PromptEncoder:
    text_len = shapes.settings.text_len
    if shapes.text_encoder is None:
        return _RandomFeatures(text_len, shapes.transformer.text_dim, placement.device)
    load = partial(_random_encoder, shapes.text_encoder, text_len, placement, formats)
    if placement.text_device.type != "cuda":
        return load()
    script = Script.from_prompts(PROMPT, seconds=1.0)
    return encode_prompts(load, [script], cut_prefix=shapes.settings.cut_prefix, device=placement.text_device)


def _random_encoder(
    config: UMT5Config, text_len: int, placement: Placement, formats: NumberFormats
) -> _RandomTextEncoder:
    """Return an encoder in its number format, which `load_text_encoder` also reads into host memory first."""
    device, precision = placement.text_device, formats.text_encoder
    place = device if precision == "bf16" else torch.device("cpu")
    model = random_weights(partial(UMT5Encoder, config), place, placement.denoise_dtype)
    if precision != "bf16":
        quantize_weights(model, precision, device, keep=POSITION_BIASES)
    return _RandomTextEncoder(model, text_len, device)


def _random_decoder(config: DecoderConfig, placement: Placement, formats: NumberFormats) -> DecoderModel:
    dtype, name = placement.decoder_dtype(formats.decoder), "random weights"
    with torch.device(placement.decode_device):
        network = TinyDecoder(config) if isinstance(config, TinyAutoencoderConfig) else Autoencoder(config)
    network = network.to(dtype).eval().requires_grad_(False)
    if placement.decode_device.type == "cuda":
        torch.cuda.empty_cache()  # float32 weights
    if isinstance(network, TinyDecoder):
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        return TinyDecoderModel(network, name=name)
    return WanDecoderModel(network, name=name, fp8=formats.decoder in FP8_FORMATS)


def _no_encoder() -> Autoencoder:
    raise UserError("random models encode no frames; leave the picture or the video out")


class _RandomFeatures:
    """A text encoder with random features for each prompt."""

    def __init__(self, length: int, dim: int, device: torch.device) -> None:
        self._shape, self._device = (length, dim), device

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        features = torch.randn(len(prompts), *self._shape, generator=torch.Generator().manual_seed(0))
        return features.to(self._device), torch.arange(len(prompts), device=self._device)

    def num_tokens(self, prompt: str) -> int:  # noqa: ARG002 - the name is that of the protocol
        """Return 1: features do not depend on the prompt."""
        return 1

    def unknown_words(self, prompt: str) -> list[str]:  # noqa: ARG002 - the name is that of the protocol
        return []


class _RandomTextEncoder:
    """A text encoder with random weights, which encodes random tokens of the full length for each prompt."""

    def __init__(self, model: UMT5Encoder, length: int, device: torch.device) -> None:
        self._model, self._length, self._device = model, length, device

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        shape, generator = (len(prompts), self._length), torch.Generator().manual_seed(0)
        ids = torch.randint(self._model.config.vocab_size, shape, generator=generator).to(self._device)
        return self._model(ids, torch.ones_like(ids)), torch.arange(len(prompts), device=self._device)

    def num_tokens(self, prompt: str) -> int:  # noqa: ARG002 - the name is that of the protocol
        return self._length

    def unknown_words(self, prompt: str) -> list[str]:  # noqa: ARG002 - the name is that of the protocol
        return []
