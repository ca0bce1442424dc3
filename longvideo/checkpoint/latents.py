"""Files of latents: read any of them, and write the one format of this project.

A file has one tensor, [C, T, H, W] or [B, C, T, H, W], normalized as a transformer makes latents. It is a .safetensors
file with the tensor `latents`, which is also what is written, a file of torch.save, or a .npy file. Only headers are
read when a file is opened, and then a few latent frames at a time.

Shapes: B videos, C channels, T latent frames, t some of them, H W latent grid.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from longvideo.checkpoint import pickle_file, safetensors_file
from longvideo.checkpoint.tensors import (
    InFile,
    InMemory,
    Lazy,
    TensorInfo,
    Weights,
    as_bytes,
    check_finite,
    listing,
    read,
    read_range,
)
from longvideo.errors import CheckpointError
from longvideo.files import Spool, check_file, locked_target, spooled

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType

LATENTS = "latents"
"""Name of the tensor."""
SUFFIX = ".latents.safetensors"
"""End of the names of files that training writes next to its samples."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
NUMPY_DTYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
MOST = {"B": 10**4, "C": 4096, "T": 10**7, "H": 1024, "W": 1024}
"""Largest allowed sizes; larger ones are mistakes that could exhaust the memory."""
MAX_FPS, MAX_CHUNK_FRAMES, MAX_FRAMES = 1000, 1024, 10**9
MAX_NAME, MAX_SHOWN = 4096, 40
SHARD_PREFIX = "clip/"
"""Start of the names of tensors in the shards of encoded clips (`longvideo.data.encoded_format`)."""


@dataclass(frozen=True, kw_only=True)
class LatentsHeader:
    """Notes about latents, for their decoding; None where they are unknown.

    model: name or path of the model that made them. base: model with the parts that are missing in `model`. fps: frames
    per second. chunk_frames: latent frames of a chunk. num_frames: frames of each video, if its last latent frame
    shows fewer than it could. adapters: names and strengths of the adapters in the transformer, for people.
    """

    model: str | None = None
    base: str | None = None
    fps: float | None = None
    chunk_frames: int | None = None
    num_frames: int | None = None
    adapters: str | None = None

    @classmethod
    def parse(cls, file: Path, metadata: Mapping[str, str]) -> LatentsHeader:
        """Return the notes in a file; other keys are ignored. Raises CheckpointError for a value out of its range."""
        return cls(
            model=_text(file, metadata, "model"),
            base=_text(file, metadata, "base"),
            fps=_number(file, metadata, "fps", MAX_FPS),
            chunk_frames=_whole(file, metadata, "chunk_frames", MAX_CHUNK_FRAMES),
            num_frames=_whole(file, metadata, "num_frames", MAX_FRAMES),
            adapters=_text(file, metadata, "adapters"),
        )

    def metadata(self) -> dict[str, str]:
        """Return the notes as texts for the header of a .safetensors file."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: f"{value:g}" if name == "fps" else str(value) for name, value in values.items() if value}


@dataclass(frozen=True)
class StoredLatents:
    """Latents in a file. shape: [B, C, T, H, W]; B is 1 where the file has no such axis."""

    path: Path
    shape: tuple[int, int, int, int, int]
    header: LatentsHeader
    _tensor: Lazy

    @property
    def num_videos(self) -> int:
        """Number of videos."""
        return self.shape[0]

    def frames(self, video: int, first: int, last: int) -> Tensor:
        """Read only the latent frames [first, last) of a video: float32 [C, t, H, W]."""
        _, channels, total, height, width = self.shape
        assert 0 <= video < self.num_videos and 0 <= first < last <= total
        size = height * width
        starts = [((video * channels + channel) * total + first) * size for channel in range(channels)]
        rows = [read_range(self._tensor, start, (last - first) * size) for start in starts]
        return torch.stack(rows).float().view(channels, last - first, height, width)

    def check_values(self) -> None:
        """Read all values once. Raises CheckpointError for NaN, infinity and values that float32 cannot hold."""
        for piece in self._tensor.pieces():
            check_finite(piece.float(), str(self.path))


def open_latents(path: Path) -> StoredLatents:
    """Open a .safetensors, .pt, .pth or .npy file. Only its header is read, unless its values are not in row order.

    A file of torch.save has a tensor, or a dict with it. A tensor under another name than `latents` is accepted if it
    is the only one. Raises CheckpointError, naming the file, for anything that is not a tensor of latents.
    """
    check_file(path, "file of latents")
    tensor, metadata = _open(path)
    info = tensor.info
    if len(info.shape) not in (4, 5):
        raise CheckpointError(
            f"{path} has a tensor of shape {list(info.shape)}; expected latents [C, T, H, W] or [B, C, T, H, W]"
        )
    if info.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        dtype = str(info.dtype).removeprefix("torch.")
        raise CheckpointError(f"{path} has latents of dtype {dtype}; expected one of {names}; cast them")
    batch, channels, total, height, width = (1,) * (5 - len(info.shape)) + info.shape
    for (axis, most), size in zip(MOST.items(), (batch, channels, total, height, width), strict=True):
        if not 1 <= size <= most:
            raise CheckpointError(
                f"{path} has latents of shape {list(info.shape)} with {axis}={size}; expected 1 to {most} in [B, C, T,"
                " H, W]"
            )
    if not isinstance(tensor, InFile):
        tensor = InMemory(read(tensor))
    shape = (batch, channels, total, height, width)
    return StoredLatents(path, shape, LatentsHeader.parse(path, metadata), tensor)


def save_latents(path: Path, latents_BCTHW: Tensor, header: LatentsHeader) -> None:
    """Write latents to a .safetensors file, in their dtype. Raises WriteError for errors of the disk."""
    weights = Weights.of({LATENTS: latents_BCTHW})
    safetensors_file.write_weights(path, weights, metadata=header.metadata())


class LatentsWriter:
    """Collects the latents of a video while it is generated, and writes them to a .safetensors file at its end.

    They are collected in a temporary file next to it, so a video of any length takes no memory. It is used as a
    context manager, which removes the temporary file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stack = ExitStack()
        self._spool: Spool | None = None
        self._parts: list[InFile] = []

    def __enter__(self) -> LatentsWriter:
        with ExitStack() as stack:
            stack.enter_context(locked_target(self.path))
            self._spool = stack.enter_context(spooled(self.path))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def num_latents(self) -> int:
        """Number of latent frames so far."""
        return sum(part.info.shape[2] for part in self._parts)

    def add(self, latents_BCtHW: Tensor) -> None:
        """Add the next latent frames, of the same size and dtype in every call. Raises WriteError for a full disk."""
        assert self._spool is not None, "use it as a context manager"
        latents_BCtHW = latents_BCtHW.detach().cpu().contiguous()
        offset = self._spool.append(as_bytes(latents_BCtHW.flatten()))
        info = TensorInfo(tuple(latents_BCtHW.shape), latents_BCtHW.dtype)
        self._parts.append(InFile(info, self._spool.file, offset))

    def finish(self, num_latents: int, header: LatentsHeader) -> None:
        """Write the first latent frames, at least one. Raises WriteError for errors of the disk."""
        parts, left = [], num_latents
        for part in self._parts:
            if left:
                count = min(left, part.info.shape[2])
                parts.append((part, count))
                left -= count
        assert parts and not left, (num_latents, self.num_latents)
        weights = Weights({LATENTS: _Joined(tuple(parts))})
        safetensors_file.write_weights(self.path, weights, metadata=header.metadata())


@dataclass(frozen=True)
class _Joined:
    """Tensors [B, C, t, H, W] joined in time. parts: each tensor, and how many of its first latent frames are used."""

    parts: tuple[tuple[InFile, int], ...]

    @property
    def info(self) -> TensorInfo:
        first = self.parts[0][0].info
        batch, channels, _, height, width = first.shape
        return TensorInfo((batch, channels, sum(count for _, count in self.parts), height, width), first.dtype)

    def pieces(self) -> Iterator[Tensor]:
        batch, channels, _, height, width = self.info.shape
        size = height * width
        for row in range(batch * channels):
            values = [read_range(part, row * part.info.shape[2] * size, count * size) for part, count in self.parts]
            yield torch.cat(values)


def _open(path: Path) -> tuple[Lazy, Mapping[str, str]]:
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return _open_npy(path), {}
    if suffix == ".safetensors":
        weights = safetensors_file.open_file(path)
    elif suffix in pickle_file.SUFFIXES:
        weights = pickle_file.open_file(path, bare=LATENTS)
    else:
        raise CheckpointError(
            f"{path} is not a file of latents; expected .safetensors, .pt, .pth or .npy, or a folder of encoded clips"
        )
    if any(name.startswith(SHARD_PREFIX) for name in weights.tensors):
        raise CheckpointError(f"{path} is one file of encoded clips; use its folder {path.parent}")
    if LATENTS in weights.tensors:
        return weights.tensors[LATENTS], weights.metadata
    if len(weights.tensors) != 1:
        names = listing(weights.tensors) or "no tensor"
        raise CheckpointError(
            f"{path} has {names}; expected the tensor {LATENTS!r}, or one tensor; save the latents alone"
        )
    return next(iter(weights.tensors.values())), weights.metadata


def _open_npy(path: Path) -> InFile:
    """Return the array of a .npy file. numpy checks its header and its length; nothing is unpickled."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        reason = next(iter(str(error).splitlines()), "")[: pickle_file.MAX_REASON]
        raise CheckpointError(f"{path} is truncated or not a .npy file: {reason}; copy or save it again") from error
    if not isinstance(array, np.memmap):
        raise CheckpointError(f"{path} is an archive of arrays; expected one array that numpy.save wrote")
    dtype = NUMPY_DTYPES.get(array.dtype.name) if array.dtype.isnative else None
    if dtype is None:
        raise CheckpointError(
            f"{path} has an array of {array.dtype}; expected one of {', '.join(NUMPY_DTYPES)} in native byte order;"
            " cast it"
        )
    if not array.flags.c_contiguous:
        raise CheckpointError(f"{path} is stored in column order; save numpy.ascontiguousarray of it")
    return InFile(TensorInfo(tuple(array.shape), dtype), path, int(array.offset))


def _text(file: Path, metadata: Mapping[str, str], key: str) -> str | None:
    value = metadata.get(key)
    if value is not None and (not 1 <= len(value) <= MAX_NAME or "\0" in value):
        raise CheckpointError(f"{file} states a {key} of {len(value)} characters; expected a name or a path; remove it")
    return value


def _number(file: Path, metadata: Mapping[str, str], key: str, most: int) -> float | None:
    value = metadata.get(key)
    if value is None:
        return None
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number <= most:
        raise CheckpointError(
            f"{file} states {key}={value[:MAX_SHOWN]!r}; expected a number above 0 and at most {most}; remove it"
        )
    return number


def _whole(file: Path, metadata: Mapping[str, str], key: str, most: int) -> int | None:
    number = _number(file, metadata, key, most)
    if number is not None and number != int(number):
        raise CheckpointError(f"{file} states {key}={number:g}; expected a whole number; remove it")
    return None if number is None else int(number)
