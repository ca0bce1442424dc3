"""Whether a model can be run in some number formats: its own widths, and what the hardware multiplies."""

from __future__ import annotations

import torch

from longvideo.checkpoint.folder import ModelFolder
from longvideo.errors import UserError
from longvideo.infer.shapes import ModelShapes, folder_shapes
from longvideo.kernels.attention.cudnn_fp8 import unavailable as fp8_attention_unavailable
from longvideo.kernels.fp8.scaled_mm import unavailable as fp8_unavailable
from longvideo.kernels.nvfp4.format import GROUP
from longvideo.number_formats import NumberFormats


def check_formats(folder: ModelFolder, formats: NumberFormats, *, device: torch.device) -> None:
    """Raise UserError where a folder's model cannot be run in these formats on a device. Reads no weight."""
    check_shapes(folder_shapes(folder), formats, name=str(folder.path))
    check_hardware(formats, device=device)


def check_shapes(shapes: ModelShapes, formats: NumberFormats, *, name: str) -> None:
    """Raise UserError where a model of these shapes has no such formats on any device. name: what to call it."""
    config = shapes.transformer
    if formats.precision in ("bf16", "fp8") and shapes.packed:
        raise UserError(
            f"{name} holds packed 4-bit weights, which --precision {formats.precision} cannot run; use nvfp4 or "
            "nvfp4-weights"
        )
    if formats.kv_cache == "nvfp4" and config.attention_head_dim % GROUP:
        raise UserError(
            f"a 4-bit KV cache needs a head dim that {GROUP} divides; {name} has {config.attention_head_dim}"
        )
    if formats.precision not in (None, "bf16") and (config.dim % GROUP or config.ffn_dim % GROUP):
        raise UserError(
            f"precision {formats.precision} needs widths that {GROUP} divides; {name} has {config.dim} and "
            f"{config.ffn_dim}"
        )


def check_hardware(formats: NumberFormats, *, device: torch.device) -> None:
    """Raise UserError where a device cannot multiply in these formats, whatever the model."""
    if formats.precision == "fp8" and (reason := fp8_unavailable(device)):
        raise UserError(reason)
    if formats.attention == "fp8" and device.type == "cuda" and (reason := fp8_attention_unavailable(device)):
        raise UserError(f"{reason}; or use --attention bf16")
