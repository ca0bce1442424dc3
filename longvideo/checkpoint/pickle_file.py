"""Read and write torch's .pt and .pth files tensor by tensor, without executing code in them.

The zip format of torch.save stores the values of each tensor uncompressed, as one file of the archive. torch.load under
FakeTensorMode reads the structure and the offsets of the values, but not the values. torch.save under skip_data leaves
out the values and their checksums, which are written afterwards (zip: PKWARE's APPNOTE.TXT, 4.3.9 and 4.3.12).
"""

from __future__ import annotations

import logging
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data

from longvideo.checkpoint.tensors import Computed, InFile, Lazy, TensorInfo, Weights, as_bytes, listing, read
from longvideo.errors import CheckpointError
from longvideo.files import write_file

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping
    from pathlib import Path

DAMAGE = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    pickle.UnpicklingError,
)
"""Errors that torch raises for damaged files."""
LOCAL_HEADER_BYTES, DIRECTORY_HEADER_BYTES = 30, 46
STRUCTURE, MAX_STRUCTURE_BYTES = "data.pkl", 32 * 2**20
MAX_REASON, MAX_NOTE = 200, 1000
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
# dicts of public training checkpoints, in the order of preference
ENTRIES = ("generator", "generator_ema", "model")
LORA_ENTRIES = ("generator_lora",)
# dicts around the weights of other trainers, outermost first
ENCLOSING = ("state_dict", "gen_model")
EXTRA_STATE = "_extra_state"
"""Last part of the names of what modules of TransformerEngine store next to their weights."""


class MissingEntry(CheckpointError):
    """A training checkpoint has no dict of the requested name."""


def open_file(file: Path, entry: str | None = None, *, bare: str | None = None) -> Weights:
    """Open the tensors of a file, or of one of its dicts.

    entry: name of the dict; None uses the first of ENTRIES and LORA_ENTRIES that exists, or else the file itself or
    the innermost of ENCLOSING, or else the only dict of weights in it, as DeepSpeed writes it. The metadata of the
    result has the numbers and texts of the file, such as "step", and under "entry" the name of the dict. bare: name of
    a tensor that is not in a dict; None refuses such a file.
    Raises CheckpointError, naming the file, if it is truncated, in the format before torch 1.6, or contains anything
    but tensors, numbers and texts.
    """
    _check_archive(file)
    try:
        with FakeTensorMode(), _silent_torch():
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except DAMAGE as error:
        raise CheckpointError(f"{file} is truncated or contains more than tensors: {_reason(error)}") from error
    if bare is not None and isinstance(content, Tensor):
        content = {bare: content}
    metadata, tensors = _select(file, content, entry)
    size = file.stat().st_size
    return Weights({name: _place(file, size, name, tensor) for name, tensor in tensors.items()}, [file], metadata)


def write_weights(
    file: Path,
    weights: Weights,
    *,
    within: Iterable[str] = (),
    on_bytes: Callable[[int], None] = lambda _: None,
) -> None:
    """Write a dict of tensors in pieces; the file gets its name when it is complete.

    within: names of the dicts that enclose it, outermost first. on_bytes: as in `safetensors_file.write_weights`.
    """

    def write(target: Path) -> None:
        write_structure(target, weights, within=within)
        with FakeTensorMode():
            stored = torch.load(target, weights_only=True, mmap=True)
        for key in within:
            stored = stored[key]
        checksums = {}
        with target.open("r+b") as stream:
            for name, tensor in weights.tensors.items():
                place, checksum = _offset(stored[name]), 0
                stream.seek(place)
                for piece in tensor.pieces():
                    values = as_bytes(piece)
                    stream.write(values)
                    checksum = zlib.crc32(values, checksum)
                    on_bytes(piece.numel() * piece.element_size())
                if stream.tell() > place:
                    checksums[place] = checksum
            _write_checksums(stream, checksums)

    write_file(file, write)


def write_structure(file: Path, weights: Weights, *, within: Iterable[str] = ()) -> None:
    """Write a file of the final length and structure, with zeros, which take no disk space, in place of the values."""
    with FakeTensorMode():
        content: dict[str, Any] = {
            name: torch.empty(info.shape, dtype=info.dtype) for name, info in weights.infos.items()
        }
    for key in reversed(list(within)):
        content = {key: content}
    try:
        # a stream, because torch.save would store the temporary name of a path in the archive
        with file.open("wb") as stream, skip_data(materialize_fake_tensors=True):
            torch.save(content, stream)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # the disk's error, before torch closed the archive
            raise error.__context__ from error
        raise


def _write_checksums(stream: IO[bytes], checksums: Mapping[int, int]) -> None:
    """Write the checksums of values to the two places of a zip archive: after the values, and in the central directory.

    checksums: CRC-32 by the offset of the values. torch writes archives as streams, whose headers before the values
    have no checksum. The checksum of empty values is 0 already.
    """
    with zipfile.ZipFile(stream) as archive:
        records, entry = archive.infolist(), archive.start_dir
    written = 0
    for record in records:
        place = record.header_offset + LOCAL_HEADER_BYTES + sum(_lengths(stream, record.header_offset + 26, 2))
        if place in checksums:
            checksum = struct.pack("<I", checksums[place])
            stream.seek(place + record.file_size)
            assert stream.read(4) == b"PK\x07\x08", f"no checksum after {record.filename}"
            stream.write(checksum)
            stream.seek(entry + 16)
            stream.write(checksum)
            written += 1
        entry += DIRECTORY_HEADER_BYTES + sum(_lengths(stream, entry + 28, 3))
    assert written == len(checksums), (written, len(checksums))


def _lengths(stream: IO[bytes], place: int, count: int) -> tuple[int, ...]:
    """Read `count` lengths, uint16, of the variable parts of a zip header."""
    stream.seek(place)
    return struct.unpack(f"<{count}H", stream.read(2 * count))


def _check_archive(file: Path) -> None:
    """Raise CheckpointError unless a file is a zip archive of torch.save with uncompressed values."""
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{file} is truncated or not a file of torch.save since 1.6: {_reason(error)}; copy or download it again"
        ) from error
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"{file} is compressed ({record.filename}); expected an uncompressed file of torch.save"
            )
        if record.filename.endswith(STRUCTURE) and record.file_size > MAX_STRUCTURE_BYTES:
            raise CheckpointError(
                f"{file}: {record.filename} has {record.file_size} bytes besides the tensors; expected at most"
                f" {MAX_STRUCTURE_BYTES}"
            )


@contextmanager
def _silent_torch() -> Generator[None]:
    """Suppress torch's warnings and logged tracebacks, because the raised error has the reason."""
    own = logging.getLogger("torch._subclasses.fake_tensor")
    before, own.disabled = own.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        own.disabled = before


def _reason(error: Exception) -> str:
    """Return in a few words why torch refuses a file; torch's own message advises to load it unsafely."""
    if match := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"it would run {match[1]}"
    first = next(iter(str(error).splitlines()), "")
    return first[:MAX_REASON] if not isinstance(error, pickle.UnpicklingError) and first else type(error).__name__


def _select(file: Path, content: object, entry: str | None) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} contains a {type(content).__name__}; expected a dict of tensors")
    nested = {key: value for key, value in content.items() if isinstance(value, dict)}
    if entry is None:
        entry = next((name for name in (*ENTRIES, *LORA_ENTRIES) if name in nested), None)
    elif entry not in nested:
        raise MissingEntry(f"{file} has no entry {entry!r}; use one of {listing(str(key) for key in content)}")
    metadata = {str(key): _shown(value) for key, value in content.items() if isinstance(value, int | float | str)}
    if entry is not None:
        return {**metadata, "entry": entry}, _tensors(file, nested[entry])
    enclosed: Mapping[Any, Any] = content
    for key in ENCLOSING:
        if isinstance(inner := enclosed.get(key), dict):
            enclosed = inner
    if enclosed is not content:
        return metadata, _tensors(file, enclosed)
    states = {key: value for key, value in nested.items() if _is_state_of_module(value)}
    if len(states) > 1:
        raise CheckpointError(
            f"{file} has several sets of weights; use --entry with one of {listing(map(str, states))}"
        )
    if states and not any(isinstance(value, Tensor) for value in content.values()):
        (name,) = states
        return {**metadata, "wrapper": str(name)}, _tensors(file, states[name])
    return metadata, _tensors(file, {key: content[key] for key in content if str(key) not in metadata})


def _is_state_of_module(values: Mapping[Any, Any]) -> bool:
    """Return whether a dict has tensors alone, under dotted names; the state of an optimizer has no such names."""
    tensors = {name: value for name, value in values.items() if not str(name).endswith(EXTRA_STATE)}
    return any("." in str(name) for name in tensors) and all(isinstance(value, Tensor) for value in tensors.values())


def _shown(value: float | str) -> str:
    """Return a number or text, cut to MAX_NOTE."""
    if isinstance(value, int) and value.bit_length() > MAX_NOTE:
        return f"a number of {value.bit_length()} bits"
    return str(value)[:MAX_NOTE]


def _tensors(file: Path, content: Mapping[Any, Any]) -> dict[str, Tensor]:
    content = {name: value for name, value in content.items() if not str(name).endswith(EXTRA_STATE)}
    wrong = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if wrong or not content:
        raise CheckpointError(f"{file} is not a dict of tensors: {listing(wrong) or 'it is empty'}")
    return {str(name): value for name, value in content.items()}


def _place(file: Path, size: int, name: str, tensor: Tensor) -> Lazy:
    """Return a tensor by the place of its values in the file.

    The whole storage must be inside of the file, which is checked before any memory is allocated for it.
    """
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_neg() or tensor.is_conj():
        raise CheckpointError(f"{file}: {name} is not a plain tensor; save a dense copy of it")
    storage, item = tensor.untyped_storage(), tensor.dtype.itemsize
    if getattr(storage, "_checkpoint_offset", None) is None:
        raise CheckpointError(f"{file}: {name} has no values, as on the device meta; save a tensor with values")
    start = _offset(tensor)
    if start + storage.nbytes() > size:
        raise CheckpointError(
            f"{file}: {name} ends at byte {start + storage.nbytes()} of {size}; copy or download it again"
        )
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in steps)
    if tensor.numel() * item > storage.nbytes() or (tensor.numel() and (last + 1) * item > storage.nbytes()):
        raise CheckpointError(f"{file}: {name} has {tensor.numel()} values, but fewer are stored; save a copy of it")
    info = TensorInfo(tuple(tensor.shape), tensor.dtype)
    if tensor.is_contiguous():
        return InFile(info, file, start + int(tensor.storage_offset()) * item)
    whole = InFile(TensorInfo((storage.nbytes() // item,), tensor.dtype), file, start)
    shape, stride, first = tensor.shape, tensor.stride(), tensor.storage_offset()
    return Computed(info, lambda: read(whole).as_strided(shape, stride, first))


def _offset(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._checkpoint_offset)  # type: ignore[attr-defined]
