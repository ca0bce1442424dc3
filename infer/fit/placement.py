"""Where a pipeline computes, and in which type: checked before anything is loaded."""

from __future__ import annotations

from numbers import Real
from typing import TYPE_CHECKING

import torch

from longvideo.errors import UserError
from longvideo.infer.fit.formats import check_hardware
from longvideo.infer.options import shown

if TYPE_CHECKING:
    from longvideo.quantization.number_formats import NumberFormats

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_placement(
    device: str | torch.device | None,
    decode_device: str | torch.device | None,
    decode_share: float | None,
    dtype: torch.dtype | None,
    formats: NumberFormats,
) -> tuple[torch.device, torch.device]:
    """Return the devices that denoise and decode. Raises UserError where something is of no use, whatever the model."""
    where = pick_device(device)
    decode_where = where if decode_device is None else pick_device(decode_device)
    check_decode_share(decode_share, where, decode_where)
    if dtype is not None and dtype not in DTYPES:
        names = ", ".join(map(str, DTYPES))
        raise UserError(f"dtype is {shown(dtype)}; it must be one of {names}, or None")
    check_hardware(formats, device=where)
    return where, decode_where


def check_decode_share(share: float | None, device: torch.device, decode_device: torch.device) -> None:
    """Raise UserError where two devices cannot share the decoding like that. None is no share at all."""
    if share is None:
        return
    if isinstance(share, bool) or not isinstance(share, Real) or not 0 <= share < 1:
        raise UserError(f"decode_share is {shown(share)}; it must be a number from 0 to below 1")
    if (device.type, device.index or 0) == (decode_device.type, decode_device.index or 0):
        raise UserError(f"decode_share is given, but {device} both denoises and decodes; name another decode_device")


def pick_device(device: str | torch.device | None) -> torch.device:
    """Return a device that is there; None takes CUDA if there is one. Raises UserError for any other."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    picked = named_device(device)
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {str(device)!r} is not there: {torch.cuda.device_count()} CUDA devices were found")
    return picked


def named_device(device: str | torch.device) -> torch.device:
    """Return a CPU or CUDA device by its name, be it there or not. Raises UserError for any other name."""
    if not isinstance(device, str | torch.device):
        raise UserError(f"device is {shown(device)}; use cpu, cuda or cuda:N")
    try:
        named = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device {shown(str(device))} is not a device; use cpu, cuda or cuda:N") from error
    if named.type not in ("cpu", "cuda"):
        raise UserError(f"device {str(device)!r} is not supported; use cpu or cuda")
    return named


def pick_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 on CUDA and on CPUs that multiply it in hardware, float32 elsewhere."""
    native = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32
