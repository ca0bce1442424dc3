"""What `torch.compile` must not look into."""

from __future__ import annotations

import torch

from longvideo.quantization.linear import NVFP4Linear, RoundedGELU, RoundedInput, RoundedModulatedNorm
from longvideo.quantization.straight_through import StraightThroughLinear

LAYERS = (NVFP4Linear, RoundedGELU, RoundedInput, RoundedModulatedNorm, StraightThroughLinear)
"""Modules that launch kernels of this package."""


def leave_kernels_alone() -> None:
    """Keep `torch.compile` out of modules that launch kernels of this package, in the whole process.

    It would compile the kernels again, with multiplications contracted with additions, which changes their bits. The
    classes change, not their instances, because torch compiles again for every other function that is called.
    """
    for layer in LAYERS:
        if not getattr(layer.forward, "_torchdynamo_disable", False):
            setattr(layer, "forward", torch.compiler.disable(layer.forward))  # noqa: B010 - its type is unknown
