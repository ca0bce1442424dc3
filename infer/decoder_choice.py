"""Choose the precision of a decoder, and load the decoder that a user chose with the encoder that belongs to it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from longvideo.infer.decode import decoding_threads
from longvideo.infer.encode import FrameEncoder
from longvideo.quantization.number_formats import FP8_FORMATS
from longvideo.streaming.decoders import OWN_DECODER, DecoderConfig, DecoderModel, TinyDecoderModel, WanDecoderModel
from longvideo.vae.tae import TinyAutoencoderConfig, TinyDecoder

if TYPE_CHECKING:
    from collections.abc import Callable

    from longvideo.checkpoint.decoders import StoredDecoder
    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.infer.fit.placement import Placement
    from longvideo.quantization.number_formats import DecoderPrecision, NumberFormats

RUNS = 5
"""Number of times that each data type is timed, after one run that is not."""
LEAST_GAIN = 1.2
"""Smallest ratio of the times of float32 and bfloat16 at which a CPU decodes in bfloat16, which rounds more. Where the
times are nearly equal, it keeps the choice from depending on chance."""
PROBE_FRAMES, PROBE_HEIGHT, PROBE_WIDTH, MOST_PROBE_CHANNELS = 4, 16, 28, 128
NAMES: dict[torch.dtype, DecoderPrecision] = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def with_decoder_precision(formats: NumberFormats, config: DecoderConfig, placement: Placement) -> NumberFormats:
    """Return formats whose decoder is not "auto", or is so for a data type of the placement that has no name.

    It is that of the placement's data type, bf16 on a GPU, and what is measured on a CPU. Call it while nothing else
    runs.
    """
    if formats.decoder != "auto":
        return formats
    if placement.dtype is not None or placement.decode_device.type != "cpu":
        return replace(formats, decoder=NAMES.get(placement.decoder_dtype("auto"), "auto"))
    with ThreadPoolExecutor(1) as pool:  # torch counts threads for each calling thread
        return replace(formats, decoder=pool.submit(_measured, config, decoding_threads()).result())


def faster_precision(seconds: Callable[[torch.dtype], float]) -> DecoderPrecision:
    """Return "bf16" if bfloat16 is clearly faster than float32, else "fp32".

    seconds: function that measures a data type once. It is called 1 + `RUNS` times for each, in turn, so that a busy
    moment slows down both; the shortest time of each counts.
    """
    times: dict[torch.dtype, list[float]] = {dtype: [] for dtype in NAMES}
    for _ in range(1 + RUNS):
        for dtype, own in times.items():
            own.append(seconds(dtype))
    exact, rounded = (min(own[1:]) for own in times.values())
    return "bf16" if exact >= LEAST_GAIN * rounded else "fp32"


def load_decoder(
    folder: ModelFolder, stored: StoredDecoder | None, placement: Placement, formats: NumberFormats
) -> tuple[DecoderModel, FrameEncoder]:
    """Load a decoder, and the encoder of given frames that belongs to it.

    stored: a decoder in a file; None means the model's autoencoder. formats: those that `with_decoder_precision`
    returned. The encoder is the model's own, or that of the file if the model has none. It is loaded when frames
    are first given if another decoder is used.
    """
    device = placement.decode_device
    if stored is None:
        autoencoder = folder.load_vae(device=device, dtype=placement.decoder_dtype(formats.decoder))
        decoder = WanDecoderModel(autoencoder, name=OWN_DECODER, fp8=formats.decoder in FP8_FORMATS)
        return decoder, FrameEncoder(lambda: autoencoder)
    dtype = placement.decoder_dtype(formats.decoder)
    has_own = "vae" in folder.parts
    load = partial(folder.load_vae if has_own else stored.load_encoder, device=device, dtype=dtype)
    return load_decoder_file(stored, placement, formats), FrameEncoder(load, exists=has_own or not stored.missing)


def load_decoder_file(stored: StoredDecoder, placement: Placement, formats: NumberFormats) -> DecoderModel:
    """Load a decoder in a file. formats: those that `with_decoder_precision` returned."""
    decoder = stored.load_decoder(device=placement.decode_device, dtype=placement.decoder_dtype(formats.decoder))
    if isinstance(decoder, TinyDecoder):
        return TinyDecoderModel(decoder, name=stored.kind)
    return WanDecoderModel(decoder, name=stored.kind, fp8=formats.decoder in FP8_FORMATS)


def _measured(config: DecoderConfig, threads: int) -> DecoderPrecision:
    """Return the precision in which a middle convolution of a decoder is faster on this CPU with some threads."""
    torch.set_num_threads(threads)
    is_tiny = isinstance(config, TinyAutoencoderConfig)
    channels = config.decoder_widths[-2] if is_tiny else config.decoder_base_dim * config.dim_mult[0]
    channels = min(channels, MOST_PROBE_CHANNELS)

    def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        shapes = (PROBE_FRAMES, channels, PROBE_HEIGHT, PROBE_WIDTH), (channels, channels, 3, 3)
        x, weight = (torch.zeros(shape, dtype=dtype).to(memory_format=torch.channels_last) for shape in shapes)
        return x, weight

    own = {dtype: inputs(dtype) for dtype in NAMES}

    @torch.inference_mode()
    def seconds(dtype: torch.dtype) -> float:
        start = time.perf_counter()
        F.conv2d(*own[dtype], padding=1)
        return time.perf_counter() - start

    return faster_precision(seconds)
