"""Load the text encoder on its device, in its number format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longvideo.quantization.weights_only import quantize_weights
from longvideo.text.umt5 import POSITION_BIASES

if TYPE_CHECKING:
    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.infer.fit.placement import Placement
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
