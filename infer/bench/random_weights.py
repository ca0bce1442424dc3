"""Modules with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from longvideo.checkpoint.modules import OnMeta

if TYPE_CHECKING:
    from collections.abc import Callable

M = TypeVar("M", bound=nn.Module)
DEVIATION = 0.02
MOST_DRAWN = 2**24 + 1
"""Largest number of values that are drawn. They are repeated, since a CPU draws those of the 5B for minutes; their odd
number shifts the repetition from layer to layer."""


@torch.no_grad()
def random_weights(build: Callable[[], M], device: torch.device, dtype: torch.dtype) -> M:
    """Build a module with random parameters. It never takes much more memory than these in their data type."""
    with OnMeta():
        module = build().to(dtype)
    for part in module.modules():
        # one at a time: `to_empty` of the whole gives memory twice to a module with two names, such as an embedding
        part.to_empty(device=device, recurse=False)
    parameters = list(module.parameters())
    drawn = torch.empty(min(MOST_DRAWN, sum(x.numel() for x in parameters)), dtype=dtype, device=device)
    drawn.normal_(std=DEVIATION, generator=torch.Generator(device).manual_seed(0))
    start = 0
    for parameter in parameters:
        start = _repeat(drawn, start, parameter.view(-1))
    return module.eval().requires_grad_(False)


def _repeat(drawn: Tensor, start: int, values: Tensor) -> int:
    """Fill values with drawn ones from a start on, and return the start of the next values."""
    done = 0
    while done < len(values):
        count = min(len(values) - done, len(drawn) - start)
        values[done : done + count] = drawn[start : start + count]
        done, start = done + count, (start + count) % len(drawn)
    return start
