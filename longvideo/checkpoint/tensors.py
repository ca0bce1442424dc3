"""Tensors on disk: names, shapes, dtypes and offsets are read at once, values only when they are needed.

Values are read by plain file reads, never through a memory map, so a tensor that is no longer used takes no memory, and
a model of any size is converted in little memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from longvideo.errors import CheckpointError

MAX_LISTED, MAX_NAME = 8, 120
PIECE_BYTES = 64 * 2**20
VALUES_AT_ONCE = 2**20


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor, which are available before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_values * self.dtype.itemsize


class Lazy(Protocol):
    """A tensor that is read or computed when it is needed."""

    @property
    def info(self) -> TensorInfo: ...

    def pieces(self) -> Iterator[Tensor]:
        """Yield the values in order, as flat tensors of at most about PIECE_BYTES where possible."""
        ...


@dataclass(frozen=True)
class InFile:
    """A tensor stored in row-major order in a file. offset: of its first value, bytes."""

    info: TensorInfo
    file: Path
    offset: int

    def pieces(self) -> Iterator[Tensor]:
        item = self.info.dtype.itemsize
        step = max(1, PIECE_BYTES // item)
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.offset)
            for start in range(0, self.info.num_values, step):
                piece = torch.empty(min(step, self.info.num_values - start) * item, dtype=torch.uint8)
                self._fill(stream.readinto, piece)
                yield piece.view(self.info.dtype)

    def _fill(self, read_into: Callable[[memoryview], int | None], piece: Tensor) -> None:
        view, filled = as_bytes(piece), 0
        while filled < len(view):
            count = read_into(view[filled:])
            if not count:
                raise CheckpointError(f"{self.file} ends before its last tensor; copy or download it again")
            filled += count


@dataclass(frozen=True)
class InMemory:
    """A tensor that is already in memory."""

    tensor: Tensor

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(tuple(self.tensor.shape), self.tensor.dtype)

    def pieces(self) -> Iterator[Tensor]:
        yield self.tensor.detach().cpu().contiguous().flatten()


@dataclass(frozen=True)
class Cast:
    """A tensor cast to another floating dtype."""

    source: Lazy
    dtype: torch.dtype

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.source.info.shape, self.dtype)

    def pieces(self) -> Iterator[Tensor]:
        for piece in self.source.pieces():
            yield piece.to(self.dtype)


@dataclass(frozen=True)
class Finite:
    """A tensor that is checked for NaN and infinity when it is read. label: its name in the error."""

    source: Lazy
    label: str

    @property
    def info(self) -> TensorInfo:
        return self.source.info

    def pieces(self) -> Iterator[Tensor]:
        for piece in self.source.pieces():
            check_finite(piece, self.label)
            yield piece


@dataclass(frozen=True)
class Computed:
    """A tensor that is computed from others when it is read. compute: returns the whole tensor."""

    info: TensorInfo
    compute: Callable[[], Tensor]

    def pieces(self) -> Iterator[Tensor]:
        result = self.compute()
        assert (tuple(result.shape), result.dtype) == (self.info.shape, self.info.dtype)
        yield result.contiguous().flatten()


@dataclass(frozen=True)
class Expanded:
    """A float32 tensor that is computed from fewer bits than it has; conversions store it in bf16.

    read_pieces: yields the values in order, as flat float32 tensors.
    """

    info: TensorInfo
    read_pieces: Callable[[], Iterator[Tensor]]

    def pieces(self) -> Iterator[Tensor]:
        return self.read_pieces()


def check_finite(tensor: Tensor, label: str) -> None:
    """Raise CheckpointError if a tensor, on any device, contains NaN or infinity.

    label: its name in the error. Only the smallest and largest value are computed, in one pass over the memory.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    parts = tensor.flatten().split(VALUES_AT_ONCE) if is_one_byte_float(tensor.dtype) else (tensor,)
    for part in parts:
        low, high = torch.aminmax(part.to(torch.bfloat16) if is_one_byte_float(part.dtype) else part)
        if not math.isfinite(low) or not math.isfinite(high):
            raise CheckpointError(
                f"{label} contains NaN or infinity, so its file is damaged or its training diverged; use another copy"
                " or an earlier checkpoint"
            )


def is_one_byte_float(dtype: torch.dtype) -> bool:
    """Return whether a dtype is an FP8 one. torch has little arithmetic for these; bf16 represents them exactly."""
    return dtype.is_floating_point and dtype.itemsize == 1


def read(tensor: Lazy) -> Tensor:
    """Return the whole tensor, on the CPU."""
    info = tensor.info
    if info.num_bytes <= PIECE_BYTES:
        pieces = list(tensor.pieces())
        flat = pieces[0] if len(pieces) == 1 else torch.cat([torch.empty(0, dtype=info.dtype), *pieces])
        return flat.view(info.shape)
    whole, filled = torch.empty(info.num_values, dtype=info.dtype), 0
    for piece in tensor.pieces():
        whole[filled : filled + piece.numel()] = piece
        filled += piece.numel()
    return whole.view(info.shape)


def read_range(tensor: Lazy, start: int, count: int) -> Tensor:
    """Return `count` values from index `start` on, flat, on the CPU; of a file only these values are read."""
    info = tensor.info
    assert 0 <= start <= start + count <= info.num_values
    if not isinstance(tensor, InFile):
        return read(tensor).flatten()[start : start + count]
    offset = tensor.offset + start * info.dtype.itemsize
    return read(InFile(TensorInfo((count,), info.dtype), tensor.file, offset))


class Weights:
    """Tensors by name, and the files that they come from.

    metadata: texts of all safetensors headers, or the numbers and short texts of a pickled checkpoint.
    """

    def __init__(
        self, tensors: Mapping[str, Lazy], files: Sequence[Path] = (), metadata: Mapping[str, str] | None = None
    ) -> None:
        self.tensors = dict(tensors)
        self.infos = {name: tensor.info for name, tensor in self.tensors.items()}
        self.files = tuple(files)
        self.metadata = dict(metadata or {})

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Weights:
        """Return weights of tensors in memory."""
        return cls({name: InMemory(tensor) for name, tensor in tensors.items()})

    @property
    def label(self) -> str:
        """Name of the file or folder, for errors."""
        if not self.files:
            return "these weights"
        return str(self.files[0]) if len(self.files) == 1 else f"{self.files[0].parent} ({len(self.files)} files)"

    @property
    def num_bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(info.num_bytes for info in self.infos.values())

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Return a whole tensor; one that is in the memory of the device already is not copied."""
        tensor = self.tensors[name]
        return (tensor.tensor.detach().contiguous() if isinstance(tensor, InMemory) else read(tensor)).to(device)

    def renamed(self, rename: Callable[[str], str]) -> Weights:
        """Return the same tensors under other names. Raises CheckpointError if two would get the same name."""
        originals: dict[str, str] = {}
        for name in self.tensors:
            new_name = rename(name)
            if new_name in originals:
                raise CheckpointError(
                    f"{self.label}: {originals[new_name]!r} and {name!r} are both names of {new_name!r}; remove one"
                )
            originals[new_name] = name
        tensors = {new_name: self.tensors[name] for new_name, name in originals.items()}
        return Weights(tensors, self.files, self.metadata)

    def cast(self, dtype: torch.dtype | None, *, keep: Callable[[str], bool] = lambda _: False) -> Weights:
        """Return the weights with floating tensors in another dtype. None keeps all, and `keep` the selected ones."""
        if dtype is None:
            return self
        cast = {
            name: Cast(tensor, dtype)
            for name, tensor in self.tensors.items()
            if tensor.info.dtype.is_floating_point and tensor.info.dtype != dtype and not keep(name)
        }
        return Weights({**self.tensors, **cast}, self.files, self.metadata)

    def finite(self) -> Weights:
        """Return the same tensors, with a check for NaN and infinity, which raises CheckpointError on reading."""
        checked = {name: Finite(tensor, f"{self.label}: {name}") for name, tensor in self.tensors.items()}
        return Weights(checked, self.files, self.metadata)

    def replaced(self, changes: Mapping[str, Lazy | None]) -> Weights:
        """Return the weights with some tensors replaced; None removes a tensor."""
        merged = {**self.tensors, **changes}
        return Weights({name: x for name, x in merged.items() if x is not None}, self.files, self.metadata)


def as_bytes(piece: Tensor) -> memoryview:
    """Return a view of a flat tensor on the CPU as bytes."""
    return piece.view(torch.uint8).numpy().data


def listing(names: Iterable[str]) -> str:
    """Return the first MAX_LISTED names and the number of the others, for messages."""
    names = list(names)
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    shown = [name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}..." for name in names[:MAX_LISTED]]
    return ", ".join(shown) + more
