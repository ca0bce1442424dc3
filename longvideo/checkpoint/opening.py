"""Open weight files of any kind. Only headers are read, and no code in a file is executed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from longvideo.checkpoint import pickle_file, safetensors_file
from longvideo.checkpoint.tensors import Lazy, Weights, listing
from longvideo.errors import CheckpointError
from longvideo.files import read_json

if TYPE_CHECKING:
    from collections.abc import Sequence

INDEX_SUFFIX = ".safetensors.index.json"


def open_weights(path: Path, *, stem: str | None = None, entry: str | None = None) -> Weights:
    """Open a .safetensors file, an .index.json, a .pt or .pth file, or a folder with one set of safetensors.

    stem: file name in a folder, without .safetensors or .safetensors.index.json.
    entry: dict of a .pt file that has the weights, for example "generator_ema".
    Raises CheckpointError, naming the file, if it is missing, truncated or in an unknown format.
    """
    if path.is_dir():
        return _open_folder(path, stem)
    if not path.is_file():
        raise CheckpointError(f"there is no weight file {path}")
    if entry is not None and path.suffix not in pickle_file.SUFFIXES:
        raise CheckpointError(f"{path} has one set of weights and no entry {entry!r}; leave --entry out")
    if path.name.endswith(".index.json"):
        return _open_index(path)
    if path.suffix == ".safetensors":
        return safetensors_file.open_file(path)
    if path.suffix in pickle_file.SUFFIXES:
        return pickle_file.open_file(path, entry)
    raise CheckpointError(f"{path} is not a weight file; expected .safetensors, .safetensors.index.json, .pt or .pth")


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


def sets_of_weights(folder: Path, stem: str = "*") -> list[Path]:
    """List the sets of safetensors in a folder: index files, and files that are not shards of an index."""
    indices = sorted(folder.glob(f"{stem}{INDEX_SUFFIX}"))
    sharded = {file.name.removesuffix(INDEX_SUFFIX) for file in indices}
    files = sorted(folder.glob(f"{stem}.safetensors"))
    return indices + [file for file in files if file.name.rpartition("-of-")[0][: -len("-00001")] not in sharded]


def _open_folder(folder: Path, stem: str | None) -> Weights:
    files = sets_of_weights(folder, stem or "*")
    if not files:
        raise CheckpointError(
            f"{folder} has no weights; expected {stem or 'NAME'}.safetensors, or its index and shards"
        )
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"{folder} has several sets of weights ({names}); use one of these files")
    return open_weights(files[0])


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
