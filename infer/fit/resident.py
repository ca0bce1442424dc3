"""Weights that are in the memory of a device before a model is loaded, and that the model uses where they are."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from longvideo.checkpoint.parts import TEXT_ENCODER, TRANSFORMER, VAE
from longvideo.checkpoint.tensors import InMemory
from longvideo.infer.fit.placement import numbered

if TYPE_CHECKING:
    import torch

    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.infer.fit.placement import Placement
    from longvideo.quantization.number_formats import NumberFormats

JOINED = re.compile(r"\.self_attn\.[qkv]\.(weight|bias)$")
"""Names of the weights of self-attention that streaming copies, to store q, k and v one after the other."""


def resident_bytes(folder: ModelFolder, placement: Placement, formats: NumberFormats) -> dict[torch.device, int]:
    """Return the bytes of weights on each device that a model in memory shares; nothing for a model in files.

    placement, formats: those with which the model is loaded, with its own decoder. Weights that are cast, quantized,
    moved or updated by an adapter are copied, and do not count.
    """
    places = {TRANSFORMER: (placement.device, placement.denoise_dtype)}
    if formats.precision not in (None, "bf16"):
        del places[TRANSFORMER]
    if formats.text_encoder == "bf16":
        places[TEXT_ENCODER] = placement.text_device, placement.denoise_dtype
    places[VAE] = placement.decode_device, placement.decoder_dtype(formats.decoder)
    sizes: Counter[torch.device] = Counter()
    for part, (device, dtype) in places.items():
        for name, tensor in folder.weights(part).tensors.items() if part in folder.parts else ():
            if isinstance(tensor, InMemory) and not JOINED.search(name):
                values = tensor.tensor
                if (numbered(values.device), values.dtype) == (numbered(device), dtype) and values.is_contiguous():
                    sizes[numbered(device)] += tensor.info.num_bytes
    return dict(sizes)
