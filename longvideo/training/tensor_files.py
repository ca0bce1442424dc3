"""Write tensors into .safetensors files one after the other, and compute checksums while the disk writes."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from longvideo.checkpoint.run_checkpoint import FileRecord
from longvideo.checkpoint.safetensors_file import encode_header
from longvideo.checkpoint.tensors import InMemory, TensorInfo, as_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

FILE_BYTES = 4 * 2**30
"""Approximate size of a file, so that several files can be compared with their checksums at a time."""


def write_tensors(
    folder: Path, prefix: str, infos: Mapping[str, TensorInfo], values: Iterator[Tensor]
) -> dict[str, FileRecord]:
    """Write tensors to PREFIX_00000.safetensors and so on; return the records of the files.

    infos: all tensors, in the order in which `values` yields them; one is in memory at a time. Raises OSError.
    """
    records = {}
    for number, names in enumerate(_files(infos)):
        file = f"{prefix}_{number:05d}.safetensors"
        with HashedFile(folder / file) as out:
            out.write(memoryview(encode_header({name: infos[name] for name in names}, metadata={})))
            for name in names:
                value = InMemory(next(values))
                assert value.info == infos[name]
                for piece in value.pieces():
                    out.write(as_bytes(piece))
        records[file] = out.record()
    return records


class HashedFile:
    """A new file whose SHA-256 is computed in a thread during writing. At the end of the block it is on the disk."""

    def __init__(self, file: Path) -> None:
        self._stream = file.open("xb")
        self._digest = hashlib.sha256()
        self._size = 0
        self._hashing = ThreadPoolExecutor(1)

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._hashing.shutdown()
        with self._stream as stream:
            if error[0] is None:
                stream.flush()
                os.fsync(stream.fileno())

    def write(self, data: memoryview) -> None:
        hashed = self._hashing.submit(self._digest.update, data)
        try:
            self._stream.write(data)
        finally:
            hashed.result()
        self._size += len(data)

    def record(self) -> FileRecord:
        return FileRecord(self._size, self._digest.hexdigest())


def _files(infos: Mapping[str, TensorInfo]) -> Iterator[list[str]]:
    """Divide names into files of about FILE_BYTES."""
    names: list[str] = []
    size = 0
    for name, info in infos.items():
        if names and size + info.num_bytes > FILE_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += info.num_bytes
    if names:
        yield names
