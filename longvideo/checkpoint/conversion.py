"""Convert a model of any known format to another, tensor by tensor: at most one tensor is in memory at a time.

The result is written under a temporary name next to the destination and renamed when it is complete. A conversion that
was interrupted continues after the files that it has finished, if its source and options are unchanged. After an error,
such as a full disk, no file of it remains.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch

from longvideo.checkpoint import packed
from longvideo.checkpoint.adapters import Adapter
from longvideo.checkpoint.choices import StoredPrecision, TargetName
from longvideo.checkpoint.formats import recognize
from longvideo.checkpoint.fp8_layers import in_fp8
from longvideo.checkpoint.locations import locate
from longvideo.checkpoint.parts import TRANSFORMER
from longvideo.checkpoint.saving import MAX_SHARD_BYTES, SaveOptions
from longvideo.checkpoint.scaled import ScaledE4M3
from longvideo.checkpoint.targets import TARGETS, ConversionTask
from longvideo.checkpoint.tensors import Expanded, Weights, is_one_byte_float
from longvideo.checkpoint.updates import merged, report_widened
from longvideo.errors import CheckpointError, UserError
from longvideo.files import locked_target, write_file, write_folder
from longvideo.kernels.nvfp4.format import Rule
from longvideo.model.transformer import CausalTransformer
from longvideo.quantization.convert import layers_to_quantize
from longvideo.quantization.fp8 import layers_in_fp8

if TYPE_CHECKING:
    from longvideo.checkpoint.folder import ModelFolder

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NVFP4, FP8, FULL, LORA, MODELOPT = "nvfp4", "fp8", "fp32", "lora", "modelopt"
REMEDY = "choose another name"


@dataclass(frozen=True)
class ConversionOptions:
    """Options of a conversion.

    target: a format, one of TARGETS. precision: of the transformer, "bf16", "fp32", "nvfp4", or "fp8", which only the
    target "modelopt" stores; None keeps the stored one, and bf16 for weights that are computed from 8 bits and scales,
    if the target does not store these. rule: scaling rule for packing to NVFP4. keep:
    official names of layers that are not packed. max_shard_bytes: largest file of a folder, bytes.
    """

    target: TargetName = "longvideo"
    precision: StoredPrecision | None = None
    rule: Rule = Rule.ADAPTIVE
    keep: tuple[str, ...] = ()
    max_shard_bytes: int = MAX_SHARD_BYTES

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UserError(f"target {self.target!r} is not a format; use one of {', '.join((*TARGETS, LORA))}")
        if self.precision not in (None, *get_args(StoredPrecision)):
            raise UserError(f"precision is {self.precision!r}; expected one of {', '.join(get_args(StoredPrecision))}")
        if self.precision == FP8 and self.target != MODELOPT:
            raise UserError(f"{self.target} does not store fp8; use --to modelopt, or another --precision")


@dataclass(frozen=True)
class Progress:
    """Callbacks of a conversion.

    on_total: called once with the number of bytes to write. on_bytes: called with the bytes of every piece that is
    written, or that an interrupted conversion has written before. on_packed: see `packed.OnPacked`.
    """

    on_total: Callable[[int], None] = lambda _: None
    on_bytes: Callable[[int], None] = lambda _: None
    on_packed: packed.OnPacked = lambda *_: None


SILENT = Progress()


def convert_model(
    source: ModelFolder,
    destination: Path,
    options: ConversionOptions,
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> None:
    """Write a model in another format.

    Raises CheckpointError or UserError before anything is written if a tensor is missing, unknown, or has a wrong shape
    or dtype, if the target format cannot store something, and if the disk has too little space. Raises CheckpointError
    during the conversion for NaN or infinity in a tensor.
    """
    target = TARGETS[options.target]
    destination = _check_destination(destination, target.suffixes, overwrite=overwrite)
    _check_source_stays(source, destination)
    weights = {part: source.weights(part) for part in source.parts if part in target.parts}
    for part in weights:
        source.check(part)
    if TRANSFORMER in weights:
        if options.precision is None:
            report_widened(source.base_weights, source.adapters)
        weights[TRANSFORMER] = _in_precision(source, options, progress.on_packed)
    if options.precision != FULL:
        weights = {part: _without_padding(own) for part, own in weights.items()}
    target.check(source, weights)
    weights = {part: own.finite() for part, own in weights.items()}
    total = sum(own.num_bytes for own in weights.values())
    stamps = _stamps(weights)
    metadata = {part: own.metadata for part, own in weights.items()}
    plan = {**asdict(options), "settings": asdict(source.settings), "metadata": metadata, "files": stamps}

    def write(path: Path) -> None:
        _check_free_space(destination.parent, total - _bytes_done(path))
        progress.on_total(total)
        saving = SaveOptions(options.max_shard_bytes, resume=True, on_bytes=progress.on_bytes)
        target.write(ConversionTask(path, source, weights, saving))
        if _stamps(weights) != stamps:
            raise CheckpointError(f"{source.path} changed during the conversion; convert it again")

    with locked_target(destination):
        # another process may have written it before this one got the lock
        _check_destination(destination, target.suffixes, overwrite=overwrite)
        if target.suffixes:
            write_file(destination, write)
        else:
            with write_folder(destination, overwrite=overwrite, plan=plan) as folder:
                write(folder)


def convert_adapter(
    source: str | Path, destination: Path, *, base: str | None, entry: str | None = None, overwrite: bool = False
) -> None:
    """Write a LoRA of any known format as a folder for peft, with a second file for diffusers.

    base: name of the base model that the result refers to. Raises CheckpointError if the source is not a LoRA.
    """
    destination = _check_destination(destination, (), overwrite=overwrite)
    stored = recognize(locate(source), entry=entry)
    if stored.adapter is None:
        raise CheckpointError(f"{source} is not a LoRA but a {stored.format}")
    with locked_target(destination), write_folder(destination, overwrite=overwrite) as folder:
        Adapter.of(stored.adapter).save(folder, base=base or "")


def _in_precision(source: ModelFolder, options: ConversionOptions, on_packed: packed.OnPacked) -> Weights:
    own = source.weights(TRANSFORMER)
    if options.precision is None:
        scaled = [name for name, tensor in own.tensors.items() if isinstance(tensor, ScaledE4M3)]
        return in_fp8(own, [name.removesuffix(".weight") for name in scaled]) if options.target == MODELOPT else own
    if options.precision == FP8:
        if source.is_packed:
            raise CheckpointError(
                f"{source.path} has packed 4-bit weights; use --precision nvfp4, or the model that they were made from"
            )
        model = source.build(TRANSFORMER)
        assert isinstance(model, CausalTransformer)
        own = own.cast(torch.bfloat16, keep=lambda name: isinstance(own.tensors[name], ScaledE4M3))
        return in_fp8(own, layers_in_fp8(model))
    if options.precision == NVFP4:
        model = source.build(TRANSFORMER)
        assert isinstance(model, CausalTransformer)
        own = own.cast(torch.bfloat16, keep=lambda name: not _is_fp8(own, name))
        layers = [name for name in layers_to_quantize(model, options.keep) if f"{name}.weight" in own.tensors]
        return packed.pack(own, layers, options.rule, on_packed=on_packed)
    dtype = DTYPES[options.precision]
    if source.adapters:
        own = merged(source.base_weights, source.adapters, dtype=dtype)
    return packed.unpack(own).cast(dtype)


def _without_padding(weights: Weights) -> Weights:
    """Return the weights with bf16 in place of float32 that is computed from fewer bits."""
    return weights.cast(torch.bfloat16, keep=lambda name: not isinstance(weights.tensors[name], Expanded))


def _is_fp8(weights: Weights, name: str) -> bool:
    return is_one_byte_float(weights.infos[name].dtype) and not packed.is_of_packed_layer(name)


def _stamps(weights: Mapping[str, Weights]) -> dict[str, list[int]]:
    """Return size and modification time of the files that tensors come from, to detect a changed source."""
    files = {file for own in weights.values() for file in own.files}
    return {str(file.resolve()): [(status := file.stat()).st_size, status.st_mtime_ns] for file in sorted(files)}


def _check_destination(path: Path, suffixes: tuple[str, ...], *, overwrite: bool) -> Path:
    """Return the path to write, with links resolved. suffixes: allowed for a file; empty for a folder.

    Raises UserError for another suffix, and for an existing path unless it is a model that may be replaced.
    """
    path = Path(os.path.realpath(path.expanduser()))
    if suffixes and path.suffix not in suffixes:
        raise UserError(f"{path} does not end in {' or '.join(suffixes)}, as a file of this format must; rename it")
    if not path.exists():
        return path
    if not overwrite:
        raise UserError(f"{path} exists; choose another name or add --overwrite")
    if path.is_file() != bool(suffixes):
        expected = "file" if suffixes else "folder"
        raise UserError(f"{path} is not a {expected}, as this format is, and is not replaced; {REMEDY}")
    if path in (Path.cwd(), *Path.cwd().parents):
        raise UserError(f"{path} contains the current folder and is not replaced; {REMEDY}")
    if path.is_dir() and any(path.iterdir()):
        try:
            recognize(path)
        except UserError as error:
            raise UserError(f"{path} is not a model in a known format and is not replaced; {REMEDY}") from error
    return path


def _check_source_stays(source: ModelFolder, destination: Path) -> None:
    """Raise UserError if replacing the destination would delete files of which the source is only a part."""
    own = Path(os.path.realpath(source.path))
    if own == destination:
        return
    for part in source.parts:
        for file in source.weights(part).files:
            if destination in Path(os.path.realpath(file)).parents:
                raise UserError(f"{destination} contains {file} of the source and is not replaced; {REMEDY}")


def _bytes_done(path: Path) -> int:
    """Return the number of bytes that an interrupted conversion has finished."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())


def _check_free_space(folder: Path, num_bytes: int) -> None:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        raise UserError(
            f"{existing} has {free / 1e6:,.1f} MB free, {num_bytes / 1e6:,.1f} MB are needed; free some space or write"
            " to another disk"
        )
