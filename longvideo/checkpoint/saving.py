"""Write weights as one .safetensors file, or as numbered shards with an index."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longvideo.checkpoint import safetensors_file
from longvideo.checkpoint.tensors import Weights
from longvideo.files import write_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from torch import Tensor

MAX_SHARD_BYTES = 5 * 2**30


@dataclass(frozen=True)
class SaveOptions:
    """Options of writing weights.

    max_shard_bytes: largest file, bytes. resume: whether shards are kept that an interrupted save of the same tensors
    has finished. on_bytes: called with the number of bytes that are written or kept, for progress.
    """

    max_shard_bytes: int = MAX_SHARD_BYTES
    resume: bool = False
    on_bytes: Callable[[int], None] = lambda _: None


SAVE = SaveOptions()


def save_weights(
    folder: Path,
    stem: str,
    weights: Weights | Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    options: SaveOptions = SAVE,
) -> None:
    """Write folder/stem.safetensors, or numbered shards with an index if one file would be too large.

    dtype: of floating tensors; None keeps their own. metadata: texts for the header of every file.

    Each file is written under a temporary name and renamed, the index last; shards of an earlier save are deleted after
    that.
    """
    weights = (weights if isinstance(weights, Weights) else Weights.of(weights)).cast(dtype)
    header = {"format": "pt", **(metadata or {})}
    folder.mkdir(parents=True, exist_ok=True)
    before = {file for file in folder.glob(f"{stem}*.safetensors*") if file.is_file()}
    written: set[Path] = set()
    weight_map: dict[str, str] = {}
    shards = plan_shards(weights, options.max_shard_bytes)
    for number, names in enumerate(shards, start=1):
        name = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = Weights({key: weights.tensors[key] for key in names}, weights.files)
        if options.resume and safetensors_file.is_complete(folder / name, shard, metadata=header):
            options.on_bytes(shard.num_bytes)
        else:
            safetensors_file.write_weights(folder / name, shard, metadata=header, on_bytes=options.on_bytes)
        weight_map.update(dict.fromkeys(names, name))
        written.add(folder / name)
    if len(shards) > 1:
        index_file = folder / f"{stem}.safetensors.index.json"
        index = {"metadata": {"total_size": weights.num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(index_file, index)
        written.add(index_file)
    for stale in before - written:
        stale.unlink()


def plan_shards(weights: Weights, max_shard_bytes: int) -> list[list[str]]:
    """Divide names, in their order, into shards within the limit; a larger tensor gets a shard of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, info in weights.infos.items():
        if shards[-1] and filled + info.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += info.num_bytes
    return shards
