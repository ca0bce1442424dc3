"""Choices of formats, precisions and adapters, which the command line reads without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from longvideo.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

TargetName = Literal["longvideo", "diffusers", "official", "longlive", "safetensors", "modelopt"]
"""A format that a model is converted to."""

StoredPrecision = Literal["bf16", "fp32", "nvfp4", "fp8"]
"""Precision in which a transformer is stored; fp8 only in the layout of ModelOpt."""


@dataclass(frozen=True)
class AdapterChoice:
    """An adapter that a user chose. name: its file or folder, or a hub id. strength: factor of its changes."""

    name: str
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not self.name or "\0" in self.name:
            raise UserError(f"the adapter {self.name!r} has no name; use PATH or PATH:STRENGTH")
        if not math.isfinite(self.strength):
            raise UserError(f"the adapter {self.name} has the strength {self.strength}; expected a finite number")

    @classmethod
    def parse(cls, text: str | Path) -> AdapterChoice:
        """Read PATH or PATH:STRENGTH. The strength is what follows the last colon, if that is a number."""
        name, colon, end = str(text).rpartition(":")
        try:
            strength = float(end) if colon else None
        except ValueError:
            strength = None
        return cls(str(text)) if strength is None else cls(name, strength)


def adapter_choices(adapters: Sequence[str | Path]) -> tuple[AdapterChoice, ...]:
    """Read adapters as a user wrote them, in their order. Raises UserError for anything but a list of paths."""
    if isinstance(adapters, str | Path) or not all(isinstance(one, str | Path) for one in adapters):
        raise UserError(f"adapters is {adapters!r}; expected a list of paths, each PATH or PATH:STRENGTH")
    return tuple(map(AdapterChoice.parse, adapters))
