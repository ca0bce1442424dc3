"""Open weight files of any kind. Only headers are read, and no code in a file is executed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from longvideo.checkpoint import gguf_file, pickle_file, safetensors_file
from longvideo.checkpoint.scaled import as_own_layers
from longvideo.checkpoint.tensors import Lazy, Weights, listing
from longvideo.errors import CheckpointError
from longvideo.files import read_json

if TYPE_CHECKING:
    from collections.abc import Sequence

INDEX_SUFFIX = ".safetensors.index.json"
SAFETENSORS = ".safetensors"
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)(?P<suffix>\.\w+)")
TRANSFORMERS_STEM = "pytorch_model"
"""Stem of the .bin files of transformers; diffusers' have the stem of its .safetensors files."""
MAX_SHARDS = 10000


@dataclass(frozen=True)
class WeightReader:
    """Opens weight files of any kind. entry: dict of a .pt file that has the weights, for example "generator_ema".

    Layers with scales of other programs become those of this project, see `scaled.as_own_layers`. Methods raise
    CheckpointError, naming the file, if it is missing, truncated or in an unknown format.
    """

    entry: str | None = None

    def open_set(self, files: Sequence[Path]) -> Weights:
        """Open the files of one set of weights."""
        return as_own_layers(join([self._open_file(file) for file in files]))

    def open_one_of_several(self, files: Sequence[Path]) -> Weights:
        """Open one of the sets of weights in a folder. The entry is ignored for a file that does not have it."""
        if files[0].suffix in pickle_file.SUFFIXES:
            try:
                return self.open_set(files)
            except pickle_file.MissingEntry:
                pass
        return WeightReader().open_set(files)

    def _open_file(self, path: Path) -> Weights:
        if not path.is_file():
            raise CheckpointError(f"there is no weight file {path}")
        is_gguf = path.suffix == gguf_file.SUFFIX or gguf_file.is_gguf(path)
        if path.suffix in pickle_file.SUFFIXES and not is_gguf:
            return pickle_file.open_file(path, self.entry)
        if self.entry is not None:
            raise CheckpointError(f"{path} has one set of weights and no entry {self.entry!r}; leave --entry out")
        if path.name.endswith(".index.json"):
            return _open_index(path)
        if is_gguf:
            return gguf_file.open_file(path)
        if path.suffix == SAFETENSORS:
            return safetensors_file.open_file(path)
        raise CheckpointError(
            f"{path} is not a weight file; expected .safetensors, .safetensors.index.json, .pt, .pth or .gguf"
        )


def open_weights(path: Path, *, stem: str | None = None) -> Weights:
    """Open a .safetensors file, an .index.json, a .pt, .pth or .gguf file, or a folder with one set of safetensors.

    stem: file name in a folder, without .safetensors or .safetensors.index.json. Errors are those of `WeightReader`.
    """
    return WeightReader().open_set(_files_of_folder(path, stem) if path.is_dir() else [path])


def join(parts: Sequence[Weights]) -> Weights:
    """Combine the tensors of several files.

    Raises CheckpointError if two tensors have the same name, and if the metadata of two files differ.
    """
    tensors: dict[str, Lazy] = {}
    sources: dict[str, str] = {}
    metadata: dict[str, str] = {}
    for part in parts:
        for key, value in part.metadata.items():
            if metadata.setdefault(key, value) != value:
                raise CheckpointError(
                    f"{part.label} has {key}={value!r}, but another file of the same weights has {metadata[key]!r}"
                )
        for name, tensor in part.tensors.items():
            if name in sources:
                raise CheckpointError(f"{name!r} is both in {sources[name]} and in {part.label}; remove one of them")
            tensors[name], sources[name] = tensor, part.label
    return Weights(tensors, [file for part in parts for file in part.files], metadata)


def sets_of_weights(folder: Path, stem: str = "*", suffixes: Sequence[str] = (SAFETENSORS,)) -> list[list[Path]]:
    """List the sets of weights in a folder: index files, shards without an index, and single files.

    stem: pattern of file names without suffix. Raises CheckpointError if a shard is missing.
    """
    indices = sorted(folder.glob(f"{stem}{INDEX_SUFFIX}")) if SAFETENSORS in suffixes else []
    indexed = {file.name.removesuffix(INDEX_SUFFIX) for file in indices}
    sets = {file.name: [file] for file in indices}
    for suffix in suffixes:
        for file in sorted({*folder.glob(f"{stem}{suffix}"), *folder.glob(f"{stem}-*-of-*{suffix}")}):
            shard = SHARD.fullmatch(file.name)
            if shard is None:
                sets[file.name] = [file]
            elif suffix != SAFETENSORS or shard["stem"] not in indexed:
                shards = shards_of(file)
                sets[shards[0].name] = shards
    return list(sets.values())


def shards_of(file: Path) -> list[Path]:
    """Return the files of the set that a file belongs to: all shards, or the file alone.

    Raises CheckpointError if one of the shards is missing.
    """
    shard = SHARD.fullmatch(file.name)
    if shard is None or not 1 <= int(shard["count"]) <= MAX_SHARDS:
        return [file]
    width = len(shard["number"])
    shards = [
        file.parent / f"{shard['stem']}-{number:0{width}d}-of-{shard['count']}{shard['suffix']}"
        for number in range(1, int(shard["count"]) + 1)
    ]
    if missing := [other.name for other in shards if not other.is_file()]:
        raise CheckpointError(f"{file} is one of {len(shards)} shards, but {listing(missing)} is missing; copy it too")
    return shards


def _files_of_folder(folder: Path, stem: str | None) -> list[Path]:
    """Return the files of the only set of weights, or of that with a stem.

    With a stem, safetensors come first, then a variant such as fp16, then .bin files.
    """
    choices = [sets_of_weights(folder, stem or "*")]
    if stem is not None:
        choices.append(sets_of_weights(folder, f"{stem}.*"))
        choices.append(sets_of_weights(folder, stem, (".bin",)))
        choices.append(sets_of_weights(folder, TRANSFORMERS_STEM, (".bin",)))
    sets = next(filter(None, choices), [])
    if not sets:
        raise CheckpointError(
            f"{folder} has no weights; expected {stem or 'NAME'}.safetensors, or its index and shards"
        )
    if len(sets) > 1:
        names = ", ".join(files[0].name for files in sets)
        raise CheckpointError(f"{folder} has several sets of weights ({names}); use one of these files")
    return sets[0]


def _open_index(path: Path) -> Weights:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map; expected the index of sharded safetensors")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} lists {name!r} in {file!r}; expected the name of a .safetensors file in the same folder"
            )
    files = [path.parent / file for file in sorted(set(weight_map.values()))]
    weights = join([safetensors_file.open_file(file) for file in files])
    missing = [name for name in weight_map if name not in weights.infos]
    if missing:
        raise CheckpointError(f"{path} lists {len(missing)} tensors that are not in its files: {listing(missing)}")
    return weights
