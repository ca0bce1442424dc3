"""Updates of a transformer by adapters, in one form for every file format, and their sum with the weights."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from longvideo.checkpoint.packed import PACKED_LEAVES, unpack
from longvideo.checkpoint.tensors import Computed, Expanded, Finite, Lazy, TensorInfo, Weights, is_one_byte_float, read
from longvideo.errors import CheckpointError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LowRank:
    """An update `scale * up @ down` of a weight (LoRA, arXiv 2106.09685).

    down: [rank, in], or [rank, in, *kernel] for a convolution. up: [out, rank], or [out, rank, 1, ...]. magnitude:
    [out], the norms that the rows of the sum get (DoRA, arXiv 2402.09353, equation 5); None without DoRA.
    """

    down: Lazy
    up: Lazy
    scale: float
    magnitude: Lazy | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that it updates."""
        return self.up.info.shape[0], *self.down.info.shape[1:]

    @property
    def rank(self) -> int:
        return self.down.info.shape[0]

    @property
    def parts(self) -> tuple[Lazy, ...]:
        """Its tensors."""
        return (self.down, self.up) if self.magnitude is None else (self.down, self.up, self.magnitude)

    def checked(self, label: str) -> LowRank:
        """Return the same update, with a check for NaN and infinity on reading. label: its name in the error."""
        magnitude = None if self.magnitude is None else Finite(self.magnitude, label)
        return replace(self, down=Finite(self.down, label), up=Finite(self.up, label), magnitude=magnitude)

    def added(self, weight: Tensor, strength: float) -> Tensor:
        """Return a float32 weight plus the update. strength: factor of the change."""
        up, down = read(self.up).float().flatten(1), read(self.down).float().flatten(1)
        if self.magnitude is None:
            return weight + (self.scale * strength) * (up @ down).view(weight.shape)
        whole = weight + self.scale * (up @ down).view(weight.shape)
        rows = whole.flatten(1)
        scaled = (read(self.magnitude).float().flatten() / rows.norm(dim=1))[:, None] * rows
        return weight + strength * (scaled.view(weight.shape) - weight)


@dataclass(frozen=True)
class Difference:
    """An update `scale * values` of a parameter with the same shape."""

    values: Lazy
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter that it updates."""
        return self.values.info.shape

    @property
    def parts(self) -> tuple[Lazy, ...]:
        """Its tensors."""
        return (self.values,)

    def checked(self, label: str) -> Difference:
        """Return the same update, with a check for NaN and infinity on reading. label: its name in the error."""
        return replace(self, values=Finite(self.values, label))

    def added(self, parameter: Tensor, strength: float) -> Tensor:
        """Return a float32 parameter plus the update. strength: factor of the change."""
        return parameter + (self.scale * strength) * read(self.values).float()


Update: TypeAlias = LowRank | Difference


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter of which only file headers and scalars are read.

    label: name of its file or folder, for errors. updates: by official parameter name, such as `blocks.0.ffn.0.weight`.
    strength: factor of all changes.
    """

    label: str
    updates: Mapping[str, Sequence[Update]]
    files: tuple[Path, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    strength: float = 1.0

    @property
    def low_rank(self) -> dict[str, LowRank]:
        """Low-rank updates by the official name of the layer."""
        return {
            name.removesuffix(".weight"): update
            for name, updates in self.updates.items()
            for update in updates
            if isinstance(update, LowRank)
        }

    @property
    def ranks(self) -> list[int]:
        """All ranks of its updates, in ascending order."""
        return sorted({update.rank for update in self.low_rank.values()})

    @property
    def scales(self) -> list[float]:
        """All scales of its low-rank updates, in ascending order."""
        return sorted({update.scale for update in self.low_rank.values()})

    @property
    def num_values(self) -> int:
        """Number of values in all its tensors."""
        parts = (part for updates in self.updates.values() for update in updates for part in update.parts)
        return sum(part.info.num_values for part in parts)

    @property
    def description(self) -> str:
        """Path and strength, as a user writes them."""
        return self._with_strength(self.label)

    @property
    def short_description(self) -> str:
        """Name of the file with its folder, and strength."""
        return self._with_strength("/".join(Path(self.label).parts[-2:]))

    def _with_strength(self, name: str) -> str:
        return name if self.strength == 1 else f"{name}:{self.strength:g}"

    def digest(self) -> str:
        """Return a digest of everything that changes the result and is not in the tensors' files."""
        scales = {name: [update.scale for update in updates] for name, updates in sorted(self.updates.items())}
        facts = [self.label, self.strength, dict(self.metadata), scales]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def finite(self) -> StoredAdapter:
        """Return the same adapter; reading NaN or infinity raises CheckpointError with the parameter's name."""
        checked = {
            name: [update.checked(f"{self.label}: the update of {name}") for update in updates]
            for name, updates in self.updates.items()
        }
        return replace(self, updates=checked)


def merged(base: Weights, adapters: Sequence[StoredAdapter], *, dtype: torch.dtype | None = None) -> Weights:
    """Return a transformer's weights with adapters added in their order; each sum is computed when it is read.

    dtype: of the sums, which are computed in fp32 and rounded once. None means the dtype of each parameter, but bf16
    for a weight of 4 or 8 bits, because so few bits would round most of an update away. An adapter of strength 0
    changes nothing.
    Raises CheckpointError for an update of a parameter that the base does not have, or that has another shape.
    """
    changes: dict[str, Lazy | None] = {}
    names = dict.fromkeys(name for adapter in adapters for name in adapter.updates)
    active = [adapter.finite() for adapter in adapters if adapter.strength]
    unpacked = unpack(base)
    for name in names:
        for adapter in adapters:
            _check_fits(adapter, name, unpacked)
        steps = [(update, one.strength) for one in active for update in one.updates.get(name, ())]
        if not steps:
            continue
        if name not in base.tensors:
            layer = name.removesuffix(".weight")
            changes |= dict.fromkeys(f"{layer}.{leaf}" for leaf in PACKED_LEAVES)
        weight, result = unpacked.tensors[name], dtype or _formats(base, name)[1]
        changes[name] = Computed(TensorInfo(weight.info.shape, result), partial(_read_sum, weight, steps, result))
    files = tuple(dict.fromkeys((*base.files, *(file for adapter in adapters for file in adapter.files))))
    notes = {f"adapter_{number}": adapter.digest() for number, adapter in enumerate(adapters)}
    return Weights(base.replaced(changes).tensors, files, {**base.metadata, **notes})


def report_widened(base: Weights, adapters: Sequence[StoredAdapter]) -> None:
    """Log one line for each stored format that is too narrow for an update, with the number of its layers."""
    names = dict.fromkeys(name for adapter in adapters if adapter.strength for name in adapter.updates)
    formats = Counter(stored for stored, _ in (_formats(base, name) for name in names) if stored is not None)
    for stored, count in formats.items():
        logger.warning(
            "%s: the %d layers that the adapter updates become bf16; %s would round most of the update away",
            *(base.label, count, stored),
        )


def _formats(base: Weights, name: str) -> tuple[str | None, torch.dtype]:
    """Return the stored format of a parameter if it is too narrow for an update, and the dtype of its sum."""
    if name not in base.tensors:
        return "NVFP4", torch.bfloat16
    if isinstance(base.tensors[name], Expanded):
        return "scaled FP8", torch.bfloat16
    dtype = base.infos[name].dtype
    if is_one_byte_float(dtype):
        return str(dtype).removeprefix("torch."), torch.bfloat16
    return None, dtype


def _check_fits(adapter: StoredAdapter, name: str, base: Weights) -> None:
    """Raise CheckpointError if an adapter updates a parameter that the unpacked base does not have in this shape."""
    for update in adapter.updates.get(name, ()):
        if name not in base.infos:
            raise CheckpointError(
                f"{adapter.label} updates {name}, which is not in {base.label}; use the model that it was trained on"
            )
        if update.shape != base.infos[name].shape:
            raise CheckpointError(
                f"{adapter.label} updates {name} of shape {list(update.shape)}, but in {base.label} its shape is"
                f" {list(base.infos[name].shape)}; use the model that it was trained on"
            )


def _read_sum(weight: Lazy, steps: Sequence[tuple[Update, float]], dtype: torch.dtype) -> Tensor:
    total = read(weight).float()
    for update, strength in steps:
        total = update.added(total, strength)
    return total.to(dtype)
