"""Devices by the names that users give."""

from __future__ import annotations

import torch

from longvideo.errors import UserError

MAX_CHARACTERS = 100


def pick_device(device: str | torch.device | None) -> torch.device:
    """Return a device of this machine; None chooses CUDA if there is a GPU, else the CPU.

    Raises UserError for a device that does not exist.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = named_device(device)
    if result.type == "cuda" and (result.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        remedy = f"use cpu or one of cuda:0 to cuda:{count - 1}" if count else "use cpu"
        raise UserError(f"device {str(device)!r} does not exist: this machine has {count} CUDA devices; {remedy}")
    return result


def named_device(device: str | torch.device) -> torch.device:
    """Return a CPU or CUDA device by its name, whether or not it exists. Raises UserError for any other name."""
    if not isinstance(device, str | torch.device):
        raise UserError(f"device is {repr(device)[:MAX_CHARACTERS]}; use cpu, cuda or cuda:N")
    try:
        result = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"{str(device)[:MAX_CHARACTERS]!r} is not a device; use cpu, cuda or cuda:N") from error
    if result.type not in ("cpu", "cuda"):
        raise UserError(f"device {str(device)!r} is not supported; use cpu, cuda or cuda:N")
    return result
