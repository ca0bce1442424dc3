"""Modules with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from longvideo.checkpoint.modules import OnMeta

if TYPE_CHECKING:
    from collections.abc import Callable

M = TypeVar("M", bound=nn.Module)
DEVIATION = 0.02


@torch.no_grad()
def random_weights(build: Callable[[], M], device: torch.device, dtype: torch.dtype) -> M:
    """Build a module and draw its parameters. It never takes more memory than its parameters in this data type."""
    with OnMeta():
        module = build().to(dtype)
    module.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in module.parameters():
        parameter.normal_(std=DEVIATION, generator=generator)
    return module.eval().requires_grad_(False)
