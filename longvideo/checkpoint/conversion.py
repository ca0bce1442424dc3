"""Turn a model of any known format into another, tensor by tensor: what is held in memory is one tensor at most.

What is written lies in a temporary neighbor of the destination until it is whole, and is then renamed. A conversion
that was interrupted continues from the files it has finished, if source and wishes are still the same; after an error,
such as a full disk, nothing of it stays.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from longvideo.checkpoint import packed
from longvideo.checkpoint.formats import recognise
from longvideo.checkpoint.locations import locate
from longvideo.checkpoint.parts import TRANSFORMER
from longvideo.checkpoint.saving import MAX_SHARD_BYTES
from longvideo.checkpoint.targets import TARGETS, Work
from longvideo.checkpoint.tensors import Weights, is_one_byte_float
from longvideo.errors import CheckpointError, UserError
from longvideo.files import locked_target, write_file, write_folder
from longvideo.kernels.nvfp4.format import Rule
from longvideo.model.transformer import CausalTransformer
from longvideo.quantization.convert import layers_to_quantize

if TYPE_CHECKING:
    from longvideo.checkpoint.folder import ModelFolder

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NVFP4, LORA = "nvfp4", "lora"


@dataclass(frozen=True)
class Wishes:
    """What to make of a model.

    target: one of TARGETS. precision: of the transformer, "bf16", "fp32" or "nvfp4", None as it is stored; rule, keep:
    how it is packed, and official names of layers that are not.
    """

    target: str = "longvideo"
    precision: str | None = None
    rule: str = Rule.ADAPTIVE.value
    keep: tuple[str, ...] = ()
    max_shard_bytes: int = MAX_SHARD_BYTES

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UserError(f"target {self.target!r} is unknown; use one of {', '.join((*TARGETS, LORA))}")
        if self.precision not in (None, *DTYPES, NVFP4):
            raise UserError(f"precision {self.precision!r} is unknown; use one of {', '.join((*DTYPES, NVFP4))}")
        if self.rule not in [rule.value for rule in Rule]:
            raise UserError(f"rule {self.rule!r} is unknown; use one of {', '.join(rule.value for rule in Rule)}")


@dataclass(frozen=True)
class Progress:
    """Called with the bytes that there will be, once, and then with those written or found as they are.

    on_packed: see `packed.OnPacked`.
    """

    on_total: Callable[[int], None] = lambda total: None
    on_bytes: Callable[[int], None] = lambda count: None
    on_packed: packed.OnPacked = lambda layer, weight, result: None


SILENT = Progress()


def convert_model(
    source: ModelFolder,
    destination: Path,
    wishes: Wishes,
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> None:
    """Write a model in another format.

    Raises CheckpointError or UserError before anything is written where a tensor is missing, unknown or of a wrong
    shape or type, where the target has no place for something, and where the disk has no room; and while it is written
    for NaN or infinity in a tensor.
    """
    target = TARGETS[wishes.target]
    destination = _check_destination(destination, target.suffixes, overwrite=overwrite)
    _check_source_stays(source, destination)
    weights = {part: source.weights(part) for part in source.parts if part in target.parts}
    for part in weights:
        source.check(part)
    if TRANSFORMER in weights:
        weights[TRANSFORMER] = _in_precision(source, wishes, progress.on_packed)
    target.check(source, weights)
    weights = {part: own.finite() for part, own in weights.items()}
    total = sum(own.num_bytes for own in weights.values())
    stamps = _stamps(weights)
    metadata = {part: own.metadata for part, own in weights.items()}
    plan = {**asdict(wishes), "settings": asdict(source.settings), "metadata": metadata, "files": stamps}

    def write(path: Path) -> None:
        _check_room(destination.parent, total - _bytes_done(path))
        progress.on_total(total)
        target.write(Work(path, source, weights, wishes.max_shard_bytes, progress.on_bytes))
        if _stamps(weights) != stamps:
            raise CheckpointError(f"{source.path} was changed while it was read; convert it again")

    with locked_target(destination):
        # another process may have written it until the lock was free
        _check_destination(destination, target.suffixes, overwrite=overwrite)
        if target.suffixes:
            write_file(destination, write)
        else:
            with write_folder(destination, overwrite=overwrite, plan=plan) as folder:
                write(folder)


def convert_adapter(
    source: str | Path, destination: Path, *, base: str | None, entry: str | None = None, overwrite: bool = False
) -> None:
    """Write a LoRA of any known format as a folder for peft, and beside it a file for diffusers.

    base: what the adapter says it belongs to. Raises CheckpointError where the source is no LoRA.
    """
    destination = _check_destination(destination, (), overwrite=overwrite)
    found = recognise(locate(source), entry=entry)
    if found.adapter is None:
        raise CheckpointError(f"{source} is no LoRA but: {found.format}")
    with locked_target(destination), write_folder(destination, overwrite=overwrite) as folder:
        found.adapter.load().save(folder, base=base or "")


def _in_precision(source: ModelFolder, wishes: Wishes, on_packed: packed.OnPacked) -> Weights:
    own = source.weights(TRANSFORMER)
    if wishes.precision is None:
        return own
    if packed.is_packed(own) and wishes.precision != NVFP4:
        raise CheckpointError(
            f"{source.path} is packed in 4 bits; its weights are not what they were, so convert the model it is from"
        )
    if wishes.precision == NVFP4:
        model = source.build(TRANSFORMER)
        assert isinstance(model, CausalTransformer)
        own = own.cast(torch.bfloat16, keep=lambda name: not _is_fp8(own, name))
        layers = [name for name in layers_to_quantize(model, wishes.keep) if f"{name}.weight" in own.tensors]
        return packed.pack(own, layers, Rule(wishes.rule), on_packed=on_packed)
    return own.cast(DTYPES[wishes.precision])


def _is_fp8(weights: Weights, name: str) -> bool:
    return is_one_byte_float(weights.infos[name].dtype) and not packed.is_of_packed_layer(name)


def _stamps(weights: Mapping[str, Weights]) -> dict[str, list[int]]:
    """Identify the files that tensors come from, so that a changed source is noticed."""
    files = {file for own in weights.values() for file in own.files}
    return {str(file.resolve()): [(status := file.stat()).st_size, status.st_mtime_ns] for file in sorted(files)}


def _check_destination(path: Path, suffixes: tuple[str, ...], *, overwrite: bool) -> Path:
    """Return where to write, links followed. suffixes: of a file; none for a folder.

    Raises UserError for another suffix, and for what is there already unless it is a model to be replaced.
    """
    path = Path(os.path.realpath(path.expanduser()))
    if suffixes and path.suffix not in suffixes:
        raise UserError(f"{path} has to end in {' or '.join(suffixes)} in this format")
    if not path.exists():
        return path
    if not overwrite:
        raise UserError(f"{path} exists; choose another place or add --overwrite")
    if path.is_file() != bool(suffixes):
        wanted = "file" if suffixes else "folder"
        raise UserError(f"{path} is no {wanted}, as this format is; it is not replaced, choose another place")
    if path in (Path.cwd(), *Path.cwd().parents):
        raise UserError(f"{path} is where this command runs; it is not replaced, choose another place")
    if path.is_dir() and any(path.iterdir()):
        try:
            recognise(path)
        except UserError as error:
            raise UserError(f"{path} holds no model that is known; it is not replaced, choose another place") from error
    return path


def _check_source_stays(source: ModelFolder, destination: Path) -> None:
    """Raise UserError where replacing the destination would take away what a model is not wholly made from."""
    own = Path(os.path.realpath(source.path))
    if own == destination:
        return
    for part in source.parts:
        for file in source.weights(part).files:
            if destination in Path(os.path.realpath(file)).parents:
                raise UserError(f"{destination} holds {file}, which is read; it is not replaced, choose another place")


def _bytes_done(path: Path) -> int:
    """Return the bytes of what an interrupted conversion has finished."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())


def _check_room(folder: Path, num_bytes: int) -> None:
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if num_bytes > free:
        raise UserError(
            f"{there} has {free / 1e6:,.1f} MB free, {num_bytes / 1e6:,.1f} MB are needed; make room or write to"
            " another disk"
        )
