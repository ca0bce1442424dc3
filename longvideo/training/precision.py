"""Arithmetic of a forward pass; weights are always fp32."""

from __future__ import annotations

from typing import Literal

import torch

TrainingPrecision = Literal["auto", "bf16", "fp32"]


def resolve(precision: TrainingPrecision, device: torch.device) -> Literal["bf16", "fp32"]:
    """Return the precision that "auto" stands for: bf16 on CUDA, fp32 on a CPU."""
    if precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return precision


def autocast(precision: TrainingPrecision, device: torch.device) -> torch.autocast:
    """Return the context of a forward pass in a precision.

    On a CPU "auto" is fp32: the backward of oneDNN's bf16 convolution breaks the heap for shapes of the autoencoder
    (seen with torch 2.13).
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=resolve(precision, device) == "bf16")
