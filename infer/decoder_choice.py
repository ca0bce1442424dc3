"""Load the decoder that a user chose, and the encoder that belongs to it."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from longvideo.infer.encode import PictureEncoder
from longvideo.quantization.number_formats import FP8_FORMATS
from longvideo.streaming.decoders import DecoderConfig, DecoderModel, TinyDecoderModel, WanDecoderModel
from longvideo.vae.tae import TinyAutoencoderConfig, TinyDecoder

if TYPE_CHECKING:
    from longvideo.checkpoint.decoders import StoredDecoder
    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.infer.fit.placement import Placement
    from longvideo.quantization.number_formats import DecoderPrecision, NumberFormats

WAN = "the autoencoder"
PROBE_FRAMES, PROBE_SIZE, PROBE_RUNS = 4, (32, 56), 3


def load_decoder(
    folder: ModelFolder, stored: StoredDecoder | None, placement: Placement, formats: NumberFormats
) -> tuple[DecoderModel, PictureEncoder, NumberFormats]:
    """Load a decoder. Return it, the encoder of first pictures, and the formats with the precision that was chosen.

    stored: a decoder in a file; None means the model's autoencoder. The encoder is the model's own, which is loaded for
    the first picture if another decoder is used, or that of the file if the model has none.
    """
    device = placement.decode_device
    if stored is None:
        formats = _measured(folder.vae_config, placement, formats)
        autoencoder = folder.load_vae(device=device, dtype=placement.decoder_dtype(formats.decoder))
        decoder = WanDecoderModel(autoencoder, name=WAN, fp8=formats.decoder in FP8_FORMATS)
        return decoder, PictureEncoder(lambda: autoencoder), formats
    model, formats = load_decoder_file(stored, placement, formats)
    dtype = placement.decoder_dtype(formats.decoder)
    load = partial(folder.load_vae if "vae" in folder.parts else stored.load_encoder, device=device, dtype=dtype)
    return model, PictureEncoder(load), formats


def load_decoder_file(
    stored: StoredDecoder, placement: Placement, formats: NumberFormats
) -> tuple[DecoderModel, NumberFormats]:
    """Load a decoder in a file. Return it, and the formats with the precision that was chosen."""
    formats = _measured(stored.config, placement, formats)
    decoder = stored.load_decoder(device=placement.decode_device, dtype=placement.decoder_dtype(formats.decoder))
    if isinstance(decoder, TinyDecoder):
        return TinyDecoderModel(decoder, name=stored.kind), formats
    return WanDecoderModel(decoder, name=stored.kind, fp8=formats.decoder in FP8_FORMATS), formats


def _measured(config: DecoderConfig, placement: Placement, formats: NumberFormats) -> NumberFormats:
    """Return the formats with the precision of the decoder that `auto` means."""
    return replace(formats, decoder=_fastest(config, placement)) if formats.decoder == "auto" else formats


def _fastest(config: DecoderConfig, placement: Placement) -> DecoderPrecision:
    """Return bf16 on a GPU, and what a convolution of the decoder measures to be the fastest on a CPU."""
    names: dict[torch.dtype, DecoderPrecision] = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    if placement.dtype is not None or placement.decode_device.type != "cpu":
        return names.get(placement.decoder_dtype("auto"), "auto")
    seconds = {precision: _probe(config, dtype) for dtype, precision in names.items()}
    return min(seconds, key=lambda precision: seconds[precision])


def _probe(config: DecoderConfig, dtype: torch.dtype) -> float:
    """Return the shortest time of a middle convolution of a decoder on this CPU, in seconds."""
    is_tiny = isinstance(config, TinyAutoencoderConfig)
    channels = config.decoder_widths[-2] if is_tiny else config.decoder_base_dim * config.dim_mult[0]
    x = torch.zeros(PROBE_FRAMES, channels, *PROBE_SIZE, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.zeros(channels, channels, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
    seconds = []
    with torch.inference_mode():
        for _ in range(PROBE_RUNS):
            start = time.perf_counter()
            F.conv2d(x, weight, padding=1)
            seconds.append(time.perf_counter() - start)
    return min(seconds)
