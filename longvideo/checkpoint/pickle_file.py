"""Read and write torch's .pt and .pth files tensor by tensor, without running what is in them.

The zip format of torch.save keeps each tensor's values uncompressed at a place of their own. torch.load under
FakeTensorMode reads the structure alone and tells the places; torch.save under skip_data leaves them to be filled, and
their checksums too (zip: PKWARE's APPNOTE.TXT, 4.3.9 and 4.3.12).
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

from longvideo.checkpoint.tensors import InFile, Lazy, Made, TensorInfo, Weights, as_bytes, listing, read
from longvideo.errors import CheckpointError
from longvideo.files import write_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
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
"""What torch raises for a file whose bytes are not what they were."""
LOCAL_HEADER_BYTES, DIRECTORY_HEADER_BYTES = 30, 46
STRUCTURE, MAX_STRUCTURE_BYTES = "data.pkl", 32 * 2**20
MAX_REASON, MAX_NOTE = 200, 1000
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
# dicts inside public training checkpoints, in the order in which they are looked for
ENTRIES = ("generator", "generator_ema", "model")
LORA_ENTRIES = ("generator_lora",)


class NoEntry(CheckpointError):
    """A training checkpoint that has no such dict."""


def open_file(file: Path, entry: str | None = None) -> Weights:
    """Open the tensors of a file, or of one of the dicts in it; None takes the first of ENTRIES that is there.

    metadata: the numbers and texts beside the tensors or dicts, such as "step", and under "entry" the dict taken.
    Raises CheckpointError, naming the file, when it is truncated, in the format before torch 1.6, or holds anything but
    tensors, numbers and texts.
    """
    _check_archive(file)
    try:
        with FakeTensorMode(), _silent_torch():
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except DAMAGE as error:
        raise CheckpointError(f"{file} is truncated or holds more than tensors: {_reason(error)}") from error
    metadata, found = _select(file, content, entry)
    size = file.stat().st_size
    return Weights({name: _place(file, size, name, tensor) for name, tensor in found.items()}, [file], metadata)


def write_weights(
    file: Path,
    weights: Weights,
    *,
    within: Iterable[str] = (),
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Write a dict of tensors, in pieces, and put the file in place when it is whole.

    within: names of the dicts around it, outermost first. on_bytes: as in `safetensors_file.write_weights`.
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
    """Write a file of the right length and structure, with zeros, which take no room, where the values are to be."""
    with FakeTensorMode():
        content: dict[str, Any] = {
            name: torch.empty(info.shape, dtype=info.dtype) for name, info in weights.infos.items()
        }
    for key in reversed(list(within)):
        content = {key: content}
    try:
        # a stream, so that the archive does not take the name of a file that is renamed later
        with file.open("wb") as stream, skip_data(materialize_fake_tensors=True):
            torch.save(content, stream)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # what the disk refused, before torch closed the archive
            raise error.__context__ from error
        raise


def _write_checksums(stream: IO[bytes], checksums: Mapping[int, int]) -> None:
    """Write the checksum of the values at each place to the two places where a zip has it: behind them, and at its end.

    Only there: torch writes zips as streams, whose headers before the values have none. Of no values it is 0 already.
    """
    with zipfile.ZipFile(stream) as archive:
        records, entry = archive.infolist(), archive.start_dir
    written = 0
    for record in records:
        place = record.header_offset + LOCAL_HEADER_BYTES + sum(_lengths(stream, record.header_offset + 26, 2))
        if place in checksums:
            checksum = struct.pack("<I", checksums[place])
            stream.seek(place + record.file_size)
            assert stream.read(4) == b"PK\x07\x08", f"no checksum behind {record.filename}"
            stream.write(checksum)
            stream.seek(entry + 16)
            stream.write(checksum)
            written += 1
        entry += DIRECTORY_HEADER_BYTES + sum(_lengths(stream, entry + 28, 3))
    assert written == len(checksums), (written, len(checksums))


def _lengths(stream: IO[bytes], place: int, count: int) -> tuple[int, ...]:
    """Read how long the name and what follows it in a header are."""
    stream.seek(place)
    return struct.unpack(f"<{count}H", stream.read(2 * count))


def _check_archive(file: Path) -> None:
    """Raise CheckpointError unless a file is a zip as torch.save writes it, with values that are not compressed."""
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{file} is truncated or no file of torch.save since 1.6: {_reason(error)}; copy or download it again"
        ) from error
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{file} is compressed ({record.filename}); torch.save writes no such files")
        if record.filename.endswith(STRUCTURE) and record.file_size > MAX_STRUCTURE_BYTES:
            raise CheckpointError(f"{file}: {record.filename} has {record.file_size} bytes beside the tensors")


@contextmanager
def _silent_torch() -> Iterator[None]:
    """Keep torch from writing to the terminal what is said in one error: tracebacks in its log, and warnings."""
    own = logging.getLogger("torch._subclasses.fake_tensor")
    before, own.disabled = own.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        own.disabled = before


def _reason(error: Exception) -> str:
    """Say in a few words why torch refuses a file; its own text advises to read it unsafely."""
    if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"it would run {found[1]}"
    first = next(iter(str(error).splitlines()), "")
    return first[:MAX_REASON] if not isinstance(error, pickle.UnpicklingError) and first else type(error).__name__


def _select(file: Path, content: object, entry: str | None) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}; wanted a dict of tensors")
    nested = {key: value for key, value in content.items() if isinstance(value, dict)}
    if entry is None:
        entry = next((name for name in (*ENTRIES, *LORA_ENTRIES) if name in nested), None)
    elif entry not in nested:
        raise NoEntry(f"{file} has no entry {entry!r}; it has {listing(str(key) for key in content)}")
    metadata = {str(key): _shown(value) for key, value in content.items() if isinstance(value, int | float | str)}
    if entry is not None:
        return {**metadata, "entry": entry}, _tensors(file, nested[entry])
    return metadata, _tensors(file, {key: content[key] for key in content if str(key) not in metadata})


def _shown(value: float | str) -> str:
    """Write a number or text, but not one without end."""
    if isinstance(value, int) and value.bit_length() > MAX_NOTE:
        return f"a number of {value.bit_length()} bits"
    return str(value)[:MAX_NOTE]


def _tensors(file: Path, content: Mapping[Any, Any]) -> dict[str, Tensor]:
    wrong = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if wrong or not content:
        raise CheckpointError(f"{file} is no dict of tensors: {listing(wrong) or 'it is empty'}")
    return {str(name): value for name, value in content.items()}


def _place(file: Path, size: int, name: str, tensor: Tensor) -> Lazy:
    """Find the values of a tensor; its whole storage must lie inside the file before any memory is taken for it."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_neg() or tensor.is_conj():
        raise CheckpointError(f"{file}: {name} is no plain tensor; save a dense copy of it")
    storage, item = tensor.untyped_storage(), tensor.dtype.itemsize
    if getattr(storage, "_checkpoint_offset", None) is None:
        raise CheckpointError(f"{file}: {name} has no values in the file, as of the device meta; save its values too")
    start = _offset(tensor)
    if start + storage.nbytes() > size:
        raise CheckpointError(
            f"{file}: {name} ends at byte {start + storage.nbytes()} of {size}; copy or download it again"
        )
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in steps)
    if tensor.numel() * item > storage.nbytes() or (tensor.numel() and (last + 1) * item > storage.nbytes()):
        raise CheckpointError(f"{file}: {name} shows {tensor.numel()} values, the file has fewer; save a copy")
    info = TensorInfo(tuple(tensor.shape), tensor.dtype)
    if tensor.is_contiguous():
        return InFile(info, file, start + int(tensor.storage_offset()) * item)
    whole = InFile(TensorInfo((storage.nbytes() // item,), tensor.dtype), file, start)
    shape, stride, first = tensor.shape, tensor.stride(), tensor.storage_offset()
    return Made(info, lambda: read(whole).as_strided(shape, stride, first))


def _offset(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._checkpoint_offset)  # type: ignore[attr-defined]
