"""Read and write .safetensors files tensor by tensor; github.com/huggingface/safetensors specifies the format.

A file consists of the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and byte range of
every tensor, and texts under __metadata__), and the values, in row-major order and without gaps.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from longvideo.checkpoint.tensors import InFile, TensorInfo, Weights, as_bytes
from longvideo.errors import CheckpointError
from longvideo.files import write_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"
LENGTH_BYTES = 8
ALIGNMENT = 8
MAX_HEADER_BYTES = 100_000_000
"""Limit of the format."""


def open_file(file: Path) -> Weights:
    """Read the header of a file. Raises CheckpointError if it is missing, truncated or not a .safetensors file."""
    if not file.is_file():
        raise CheckpointError(f"there is no weight file {file}")
    size = file.stat().st_size
    try:
        with safe_open(file, framework="pt") as handle:  # checks the header and the length of the file
            metadata = handle.metadata() or {}
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError) as error:
        cut, remedy = _first_cut(file, size), "copy or download it again"
        raise CheckpointError(
            f"{file} ({size} bytes) is truncated or not safetensors: {cut}{error}; {remedy}"
        ) from error
    header.pop(METADATA, None)
    foreign = sorted({entry["dtype"] for entry in header.values()} - DTYPES.keys())
    if foreign:
        raise CheckpointError(f"{file} has tensors of dtype {', '.join(foreign)}; expected one of {', '.join(DTYPES)}")
    start = LENGTH_BYTES + length
    tensors = {
        name: InFile(TensorInfo(tuple(entry["shape"]), DTYPES[entry["dtype"]]), file, start + entry["data_offsets"][0])
        for name, entry in header.items()
    }
    return Weights(tensors, [file], metadata)


def write_weights(
    file: Path,
    weights: Weights,
    *,
    metadata: Mapping[str, str],
    on_bytes: Callable[[int], None] = lambda _: None,
) -> None:
    """Write tensors one after another, in pieces; the file gets its name when it is complete.

    metadata: texts for the header. on_bytes: called with the number of bytes of every piece, for progress.
    """
    order = in_file_order(weights)
    header = encode_header({name: weights.infos[name] for name in order}, metadata=metadata)

    def write(target: Path) -> None:
        with target.open("wb") as stream:
            stream.write(header)
            for name in order:
                for piece in weights.tensors[name].pieces():
                    stream.write(as_bytes(piece))
                    on_bytes(piece.numel() * piece.element_size())

    write_file(file, write)


def is_complete(file: Path, weights: Weights, *, metadata: Mapping[str, str]) -> bool:
    """Return whether a file exists with the header and length that `write_weights` would give it."""
    if not file.is_file():
        return False
    header = encode_header({name: weights.infos[name] for name in in_file_order(weights)}, metadata=metadata)
    with file.open("rb") as stream:
        same = stream.read(len(header)) == header
    return same and file.stat().st_size == len(header) + weights.num_bytes


def in_file_order(weights: Weights) -> list[str]:
    """Sort names as the safetensors library does: wide dtypes first, so that all values are aligned, then by name."""
    return sorted(weights.infos, key=lambda name: (-weights.infos[name].dtype.itemsize, name))


def encode_header(infos: Mapping[str, TensorInfo], *, metadata: Mapping[str, str]) -> bytes:
    """Return the bytes before the values, for tensors whose values follow in this order."""
    entries: dict[str, object] = {METADATA: dict(metadata)}
    end = 0
    for name, info in infos.items():
        if info.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{name} is {info.dtype}, which .safetensors cannot store; cast it to another dtype")
        begin, end = end, end + info.num_bytes
        entries[name] = {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _first_cut(file: Path, size: int) -> str:
    """Return a note on the first tensor that a file is too short for; "" if its header cannot be read."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            header = json.loads(stream.read(min(length, size, MAX_HEADER_BYTES)))
            ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name != METADATA}
            cut = [name for name, end in ends.items() if LENGTH_BYTES + length + end > size]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return ""
    return f"{min(cut, key=lambda name: ends[name])} is cut off: " if cut else ""
