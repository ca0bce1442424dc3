"""Load the weights of an opened model folder for generation."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import torch

from longvideo.checkpoint.decoders import choose_decoder
from longvideo.checkpoint.fp8_layers import stored_rows
from longvideo.checkpoint.parts import TRANSFORMER
from longvideo.infer.decoder_choice import load_decoder, with_decoder_precision
from longvideo.infer.fit.formats import check_hardware, check_shapes
from longvideo.infer.fit.memory import Workload
from longvideo.infer.fit.refusal import check_memory
from longvideo.infer.fit.resident import resident_bytes
from longvideo.infer.fit.shapes import folder_shapes
from longvideo.infer.generation import Models
from longvideo.infer.text_encoder import encode_prompts, load_text_encoder
from longvideo.quantization.convert import with_precision
from longvideo.quantization.number_formats import NumberFormats
from longvideo.quantization.offloading import offload_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.distributed import ProcessGroup

    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.infer.fit.placement import Placement
    from longvideo.infer.script import Script
    from longvideo.kernels.backends import TransformerPrecision
    from longvideo.kernels.fp8.format import FP8Rows
    from longvideo.model.transformer import CausalTransformer

DEFAULT_FORMATS = NumberFormats()


def load_models(
    folder: ModelFolder,
    placement: Placement,
    *,
    formats: NumberFormats = DEFAULT_FORMATS,
    decoder_name: str | None = None,
    group: ProcessGroup | None = None,
    scripts: Sequence[Script] | None = None,
) -> Models:
    """Load the weights of an opened folder.

    formats: number formats; the default is that of the files. decoder_name: as in `choose_decoder`. group: ranks that
    share the denoising of every chunk (`longvideo.streaming.parallel`). All of them make the same calls, and rank 0
    gets the frames. scripts: the only ones that will be used, where they are known. On a GPU their prompts are then
    encoded before anything else is loaded, and the text encoder is freed.
    Raises UserError, before any weight is read, where a GPU has too little free memory.
    """
    chosen = choose_decoder(folder, decoder_name, device=placement.decode_device)
    shapes = folder_shapes(folder, chosen)
    check_shapes(shapes, formats, decode_share=placement.decode_share, name=str(folder.path))
    check_hardware(formats, placement)
    known = scripts if placement.text_device.type == "cuda" else None
    resident = resident_bytes(folder, placement, formats)
    check_memory(
        Workload(shapes=shapes, formats=formats, placement=placement, frees_text=known is not None, resident=resident)
    )
    formats = with_decoder_precision(formats.effective(packed=folder.is_packed), shapes.decoder_config, placement)
    load_text = partial(load_text_encoder, folder, placement, formats)
    with ThreadPoolExecutor() as pool:
        if known is not None:
            prefix, device = folder.settings.cut_prefix, placement.text_device
            text_encoder = pool.submit(encode_prompts, load_text, known, cut_prefix=prefix, device=device)
            text_encoder.result()  # the encoder is freed before anything else is loaded
        else:
            text_encoder = pool.submit(load_text)
        transformer = pool.submit(load_transformer, folder, placement, formats)
        decoder, encoder = load_decoder(folder, chosen, placement, formats)
        return Models(
            transformer=transformer.result(),
            decoder=decoder,
            encoder=encoder,
            text_encoder=text_encoder.result(),
            settings=folder.settings,
            spec=folder.spec,
            placement=placement,
            formats=formats,
            group=group,
            folder=folder,
            stored_decoder=chosen,
        )


def load_transformer(folder: ModelFolder, placement: Placement, formats: NumberFormats) -> CausalTransformer:
    """Load a transformer with the adapters of its folder, with the products of a precision, to where it stays.

    Layers that are stored in FP8 are used as they are where that is the precision.
    """
    packed = folder.is_packed
    transformer = folder.load_transformer(device=loading_device(placement), dtype=placement.denoise_dtype)
    stored = partial(stored_rows, folder.weights(TRANSFORMER))
    precision = formats.precision_of(packed=packed)
    return place_transformer(transformer, placement, precision, packed=packed, stored=stored)


def loading_device(placement: Placement) -> torch.device:
    """Return the device to which the weights of the transformer are read, before `place_transformer`."""
    return torch.device("cpu") if placement.low_memory or placement.offload_weights else placement.device


def place_transformer(
    transformer: CausalTransformer,
    placement: Placement,
    precision: TransformerPrecision,
    *,
    packed: bool,
    stored: Callable[[str], FP8Rows | None] = lambda _name: None,
) -> CausalTransformer:
    """Return a transformer in its number format, with its weights where a placement has them.

    transformer: on `loading_device`. packed, stored: as of `with_precision`.
    """
    if precision != "bf16" or not placement.offload_weights:  # in bf16 they go to pinned memory at once
        transformer = with_precision(transformer, precision, packed=packed, device=placement.device, stored=stored)
    if placement.offload_weights:
        offload_blocks(transformer, placement.device)
    if placement.device.type == "cuda":
        torch.cuda.empty_cache()  # torch would keep the memory of layers that are replaced
    return transformer
