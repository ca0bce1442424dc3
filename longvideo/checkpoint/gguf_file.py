"""Read the tensors of GGUF files with the package gguf, of the extra of that name.

github.com/ggml-org/ggml/blob/master/docs/gguf.md specifies the format. A tensor of a Wan model has its official name;
one of a text encoder has that of llama.cpp. Sizes are stored in reverse order, and some programs store at most four of
them and the original ones as comfy.gguf.orig_shape.NAME.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from longvideo.checkpoint import names
from longvideo.checkpoint.tensors import Expanded, InFile, Lazy, TensorInfo, Weights, read_range
from longvideo.errors import CheckpointError
from longvideo.machine.packages import require

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

SUFFIX, MAGIC = ".gguf", b"GGUF"
ARCHITECTURE, ORIGINAL_SHAPE = "general.architecture", "comfy.gguf.orig_shape."
PLAIN_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
}
VALUES_AT_ONCE = 2**20
DAMAGE = (ValueError, LookupError, TypeError, ArithmeticError, AttributeError, MemoryError, OSError)
"""Errors of the package gguf for damaged files."""


def is_gguf(file: Path) -> bool:
    """Return whether a file begins as GGUF does, whatever its name."""
    with file.open("rb") as opened:
        return opened.read(len(MAGIC)) == MAGIC


def open_file(file: Path) -> Weights:
    """Read the header of a file. Quantized tensors become float32 when they are read.

    Raises CheckpointError, naming the file, if it is damaged or has a type that the package cannot read, and UserError
    if the package is missing.
    """
    require("gguf", extra="gguf", purpose=f"reading {file}")
    import gguf

    class Reader(gguf.GGUFReader):
        """A reader that raises ValueError where a header claims more values than the file has."""

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            values = super()._get(offset, dtype, count, override_order)
            if len(values) != int(count):
                raise ValueError("it ends before its last value")
            return values

    try:
        reader = Reader(file)
        if reader.endianess != gguf.GGUFEndian.LITTLE:
            raise ValueError("its numbers are big-endian")
        tensors = {tensor.name: _tensor(file, tensor, reader) for tensor in reader.tensors}
        field = reader.get_field(ARCHITECTURE)
        architecture = "" if field is None else str(field.contents())
    except DAMAGE as error:
        raise CheckpointError(
            f"{file} is truncated or not GGUF: {str(error)[:200] or type(error).__name__}; copy or download it again"
        ) from error
    weights = Weights(tensors, [file], {ARCHITECTURE: architecture[:100]} if architecture else {})
    return weights.renamed(names.TEXT_ENCODER_GGUF.ours)


def _tensor(file: Path, tensor: Any, reader: Any) -> Lazy:
    kind, shape = tensor.tensor_type, tuple(int(size) for size in reversed(tensor.shape))
    field = reader.get_field(f"{ORIGINAL_SHAPE}{tensor.name}")
    if field is not None:
        original = tuple(int(size) for size in field.contents())
        if math.prod(original) != math.prod(shape) or min(original) < 0:
            raise ValueError(f"{tensor.name} has shape {list(shape)}, and {list(original)} as its original shape")
        shape = original
    offset = int(tensor.data_offset)
    if kind.name in PLAIN_TYPES:
        return InFile(TensorInfo(shape, PLAIN_TYPES[kind.name]), file, offset)
    _check_type(file, tensor.name, kind)
    codes = InFile(TensorInfo((int(tensor.n_bytes),), torch.uint8), file, offset)
    return Expanded(TensorInfo(shape, torch.float32), partial(_values, codes, kind))


def _check_type(file: Path, name: str, kind: Any) -> None:
    import gguf
    import numpy as np

    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError as error:
        raise CheckpointError(
            f"{file}: {name} is {kind.name}, which the package gguf cannot read; use another file of the model, such as"
            " Q8_0 or Q4_K"
        ) from error


def _values(codes: InFile, kind: Any) -> Iterator[Tensor]:
    """Yield the values of a quantized tensor, some blocks at a time."""
    import gguf

    values_of_block, bytes_of_block = gguf.GGML_QUANT_SIZES[kind]
    step = VALUES_AT_ONCE // values_of_block * bytes_of_block
    for start in range(0, codes.info.num_bytes, step):
        piece = read_range(codes, start, min(step, codes.info.num_bytes - start))
        yield torch.from_numpy(gguf.dequantize(piece.view(-1, bytes_of_block).numpy(), kind)).flatten()
