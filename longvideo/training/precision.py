"""In what arithmetic a forward pass runs; weights are always fp32."""

from __future__ import annotations

import torch

PRECISIONS = ("auto", "bf16", "fp32")


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the context of a forward pass: bf16 where asked, and by "auto" on CUDA.

    On a CPU "auto" is fp32: the backward of oneDNN's bf16 convolution breaks the heap for shapes of the autoencoder
    (seen with torch 2.13).
    """
    assert precision in PRECISIONS, precision
    enabled = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
