"""Workloads of the 5B that tests of memory share, and sums over the parts of an estimate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any

import torch

from longvideo.infer.fit.memory import MemoryPart, Workload
from longvideo.infer.fit.placement import Placement
from longvideo.infer.fit.shapes import ModelShapes, preset_shapes
from longvideo.quantization.number_formats import NumberFormats

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)
SetFree = Callable[..., list[torch.device]]
"""The fixture `gpus`, which is called with the free memory of each GPU."""


def shapes(**changes: Any) -> ModelShapes:
    """Return the shapes of the 5B with its prompts as features, with changes."""
    return replace(preset_shapes("wan2.2-ti2v-5b"), **{"text_encoder": None, **changes})


def workload(**changes: Any) -> Workload:
    """Return the 5B in bf16 on one GPU, with changes of the workload or of its placement."""
    names = [field.name for field in fields(Placement)]
    where: dict[str, Any] = {"device": FIRST, "decode_device": FIRST, "dtype": torch.bfloat16}
    where |= {name: changes.pop(name) for name in names if name in changes}
    defaults = {"shapes": shapes(), "formats": NumberFormats("bf16"), "placement": Placement(**where)}
    return Workload(**(defaults | changes))


def total(parts: Iterable[MemoryPart], device: torch.device = FIRST) -> int:
    """Return the sum of the parts on a device, in bytes."""
    return sum(part.bytes for part in parts if part.device == device)


def named(parts: Iterable[MemoryPart], device: torch.device = FIRST) -> dict[str, int]:
    """Return the parts on a device, in bytes by name."""
    own = [part for part in parts if part.device == device]
    assert max(Counter(part.name for part in own).values()) == 1
    return {part.name: part.bytes for part in own}
