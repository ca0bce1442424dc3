"""Load the text encoder on its device, in its number format, or only the features of prompts that are all known."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from longvideo.model.conditioning import chunk_text
from longvideo.quantization.weights_only import quantize_weights
from longvideo.text.known_prompts import KnownPrompts, PromptEncoder
from longvideo.text.umt5 import POSITION_BIASES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.infer.fit.placement import Placement
    from longvideo.infer.script import Script
    from longvideo.quantization.number_formats import NumberFormats
    from longvideo.text.encoder import TextEncoder


def load_text_encoder(folder: ModelFolder, placement: Placement, formats: NumberFormats) -> TextEncoder:
    """Load the text encoder of a model.

    Weights in 8 or 4 bits are read into host memory and moved to the device layer by layer, so that the device never
    holds all of them in 16 bits.
    """
    device, dtype, precision = placement.text_device, placement.denoise_dtype, formats.text_encoder
    if precision == "bf16":
        return folder.load_text_encoder(device=device, dtype=dtype)
    encoder = folder.load_text_encoder(dtype=dtype)
    quantize_weights(encoder.model, precision, device, keep=POSITION_BIASES)
    return encoder


def encode_prompts(
    load: Callable[[], PromptEncoder], scripts: Sequence[Script], *, cut_prefix: str, device: torch.device
) -> KnownPrompts:
    """Load a text encoder, encode all prompts and negative prompts of scripts, and free the encoder.

    Prompts of shots after a cut are encoded with and without the words that announce it. load: function that loads the
    encoder. device: device of the encoder.
    """
    announced = partial(chunk_text, cut=True, cut_prefix=cut_prefix)
    texts = [text for script in scripts for text in script.texts]
    after_cuts = [announced(shot.prompt) for script in scripts for shot in script.shots[1:] if shot.cut]
    counted = [announced(shot.prompt) for script in scripts for shot in script.shots]
    known = KnownPrompts(load(), [*texts, *after_cuts], counted=counted)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # torch would keep the memory in blocks of the encoder's sizes
    return known
