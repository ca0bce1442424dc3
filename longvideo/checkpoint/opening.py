"""Open weight files of any kind: only headers are read, and nothing in a file is ever executed."""

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
    """Open a .safetensors file, an .index.json, a .pt or .pth file, or a folder holding one set of safetensors.

    stem: in a folder, the name before .safetensors or .safetensors.index.json.
    entry: in a .pt file, which of its dicts holds the weights, for example "generator_ema".
    Raises CheckpointError for a missing, truncated or foreign file, naming it.
    """
    if path.is_dir():
        return _open_folder(path, stem)
    if not path.is_file():
        raise CheckpointError(f"no weight file {path}")
    if entry is not None and path.suffix not in pickle_file.SUFFIXES:
        raise CheckpointError(f"{path} holds one set of weights, and so has no entry {entry!r}")
    if path.name.endswith(".index.json"):
        return _open_index(path)
    if path.suffix == ".safetensors":
        return safetensors_file.open_file(path)
    if path.suffix in pickle_file.SUFFIXES:
        return pickle_file.open_file(path, entry)
    raise CheckpointError(f"{path} is not a weight file; wanted .safetensors, .safetensors.index.json, .pt or .pth")


def join(parts: Sequence[Weights]) -> Weights:
    """Put the tensors of several files together. Raises CheckpointError where two have one name or do not agree."""
    tensors: dict[str, Lazy] = {}
    home: dict[str, str] = {}
    metadata: dict[str, str] = {}
    for part in parts:
        for key, value in part.metadata.items():
            if metadata.setdefault(key, value) != value:
                raise CheckpointError(
                    f"{part.label} says {key}={value!r}, another file of the same weights {metadata[key]!r}"
                )
        for name, tensor in part.tensors.items():
            if name in home:
                raise CheckpointError(f"{name!r} is both in {home[name]} and in {part.label}")
            tensors[name], home[name] = tensor, part.label
    return Weights(tensors, [file for part in parts for file in part.files], metadata)


def sets_of_weights(folder: Path, stem: str = "*") -> list[Path]:
    """List the sets of safetensors in a folder: indices, and files that are no shards of one."""
    indices = sorted(folder.glob(f"{stem}{INDEX_SUFFIX}"))
    sharded = {file.name.removesuffix(INDEX_SUFFIX) for file in indices}
    files = sorted(folder.glob(f"{stem}.safetensors"))
    return indices + [file for file in files if file.name.rpartition("-of-")[0][: -len("-00001")] not in sharded]


def _open_folder(folder: Path, stem: str | None) -> Weights:
    found = sets_of_weights(folder, stem or "*")
    if not found:
        raise CheckpointError(f"no weights in {folder}: wanted {stem or 'NAME'}.safetensors, or its index and shards")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"{folder} holds several sets of weights ({names}); name one of them")
    return open_weights(found[0])


def _open_index(path: Path) -> Weights:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{path} puts {name!r} in {file!r}; wanted the name of a .safetensors file beside it")
    files = [path.parent / file for file in sorted(set(weight_map.values()))]
    weights = join([safetensors_file.open_file(file) for file in files])
    absent = [name for name in weight_map if name not in weights.infos]
    if absent:
        raise CheckpointError(f"{path} lists {len(absent)} tensors that its files lack: {listing(absent)}")
    return weights
