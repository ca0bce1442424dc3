"""Check that a model and a device support number formats, and describe what runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longvideo.errors import UserError
from longvideo.kernels.backends import attention_backend, convolution_backend, kernels_on, product_backend
from longvideo.kernels.nvfp4.format import GROUP
from longvideo.quantization.number_formats import FP8_FORMATS, PACKED_CACHES, NumberFormats
from longvideo.streaming.decoders import check_fp8, check_share

if TYPE_CHECKING:
    import torch

    from longvideo.infer.fit.placement import Placement
    from longvideo.infer.fit.shapes import ModelShapes


def check_shapes(shapes: ModelShapes, formats: NumberFormats, *, decode_share: float = 0.0, name: str) -> None:
    """Raise UserError where a model of these shapes cannot run in these formats on any device.

    decode_share: as in `Placement`. name: name of the model, for the error.
    """
    config = shapes.transformer
    if formats.precision in ("bf16", *FP8_FORMATS) and shapes.packed:
        raise UserError(
            f"precision is {formats.precision}, but the weights of {name} are packed in 4 bits; use nvfp4 or"
            " nvfp4-weights"
        )
    if formats.kv_cache in PACKED_CACHES and config.attention_head_dim % GROUP:
        raise UserError(
            f"the head dim of {name} is {config.attention_head_dim}; a 4-bit KV cache needs a multiple of {GROUP}; use"
            " kv_cache bf16"
        )
    if formats.precision not in (None, "bf16") and (config.dim % GROUP or config.ffn_dim % GROUP):
        raise UserError(
            f"the widths of {name} are {config.dim} and {config.ffn_dim}; precision {formats.precision} needs multiples"
            f" of {GROUP}; use precision bf16"
        )
    check_share(shapes.decoder_config, decode_share, shapes.decoder_name)
    if formats.decoder in FP8_FORMATS:
        check_fp8(shapes.decoder_config, shapes.decoder_name)


def check_hardware(formats: NumberFormats, placement: Placement) -> None:
    """Raise UserError where the devices do not support these formats, for any model."""
    precision, device = formats.precision_of(packed=False), placement.device
    for backend in (
        product_backend(precision, device),
        attention_backend(formats.attention, device),
        convolution_backend(formats.decoder, placement.decode_device),
    ):
        if backend.name is None:
            raise UserError(str(backend.reason))


def start_line(formats: NumberFormats, placement: Placement, *, packed: bool, decoder: str) -> str:
    """Return one line with the devices, the backends, how memory is saved, and what is emulated and why.

    packed: whether the weights of the model are packed in 4 bits. decoder: name of the decoder.
    """
    device, precision = placement.device, formats.precision_of(packed=packed)
    name = str(placement.denoise_dtype).removeprefix("torch.")
    parts = (
        f"running on {device} in {name}",
        f"products {_format(precision, name)}: {product_backend(precision, device)}",
        f"KV cache: {_kept(formats, device, name)}",
        f"attention {_format(formats.attention, name)}: {attention_backend(formats.attention, device)}",
        decoding_line(formats, placement, decoder=decoder),
    )
    memory = ["low memory"] if placement.low_memory else []
    memory += ["weights in host memory"] if placement.offload_weights else []
    return " | ".join([*parts, *_text_encoder(formats, placement), *memory])


def decoding_line(formats: NumberFormats, placement: Placement, *, decoder: str) -> str:
    """Return the device, the name and the data type of a decoder in words. decoder: name of the decoder."""
    return f"decoding on {placement.decode_device} by {decoder} in {_decoding(formats, placement)}"


def _text_encoder(formats: NumberFormats, placement: Placement) -> list[str]:
    """Return where and in which format the text encoder is, if it is not with the transformer in its data type."""
    if formats.text_encoder != "bf16":
        return [f"text encoder with weights in {formats.text_encoder}"]
    return ["text encoder on the CPU"] if placement.text_device != placement.device else []


def _kept(formats: NumberFormats, device: torch.device, dtype: str) -> str:
    exact = "in E4M3" if formats.attention in FP8_FORMATS else f"in {dtype}"
    if formats.kv_cache not in PACKED_CACHES:
        return exact
    rebuilt = f"in 4 bits, rebuilt by {kernels_on(device)}"
    return f"{rebuilt}, sink and newest chunk {exact}" if formats.kv_cache == "nvfp4-mixed" else rebuilt


def _decoding(formats: NumberFormats, placement: Placement) -> str:
    if formats.decoder in FP8_FORMATS:
        return f"{formats.decoder}: {convolution_backend(formats.decoder, placement.decode_device)}"
    if formats.decoder == "auto" and placement.dtype is None and placement.decode_device.type == "cpu":
        return "float32 or bfloat16, whichever is measured to be faster"
    return str(placement.decoder_dtype(formats.decoder)).removeprefix("torch.")


def _format(name: str, dtype: str) -> str:
    return dtype if name == "bf16" else name
