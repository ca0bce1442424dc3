"""Read the checkpoints that training writes.

A checkpoint is a folder `step_0001200`. Its state.json holds the step, the numbers of the engine, and the length and
SHA-256 of every other file. The tensors of a trained parameter are stored whole, as NAME/weight, NAME/average,
NAME/exp_avg, NAME/exp_avg_sq and NAME/step, for every engine and number of processes. They are in files of three parts:
weights_RANK_NUMBER.safetensors, ema_... and optimizer_.... States that only some settings need are in states_....
Names in a checkpoint of a distillation begin with student/ or critic/. The state of a rank's recipe is in
recipe_RANK_NUMBER.safetensors.

Format 1, which has no checksums and different files for one process and for several, is still read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from longvideo.checkpoint import safetensors_file
from longvideo.checkpoint.opening import join
from longvideo.checkpoint.tensors import InMemory, Weights, listing
from longvideo.errors import CheckpointError
from longvideo.files import read_json, reason

if TYPE_CHECKING:
    from pathlib import Path

FORMAT = 2
STATE_FILE = "state.json"
WEIGHT, AVERAGE, MOMENTS, STEP = "weight", "average", ("exp_avg", "exp_avg_sq"), "step"
AVERAGED, TRAINED = "ema", "weights"
PARTS: dict[str, tuple[str, ...]] = {TRAINED: (WEIGHT,), AVERAGED: (AVERAGE,), "optimizer": (*MOMENTS, STEP)}
"""Kinds of tensors in the files of each part."""
OTHERS = "states"
"""Part with tensors of all other kinds, which only some settings need."""
RECIPE = "recipe"
ENTRIES = (AVERAGED, TRAINED)
ROLES = ("student", "critic")
HASH_BYTES = 8 * 2**20
HASH_THREADS = 8


class DamagedError(CheckpointError):
    """A checkpoint differs from what was written."""


@dataclass(frozen=True)
class FileRecord:
    """Length in bytes and SHA-256 of a file when it was written."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class RunState:
    """The contents of state.json.

    step: number of finished steps. ranks: processes that wrote the checkpoint. sequence: processes that shared a video.
    arithmetic: number format of the losses. counts: numbers of the engine. files: records of all other files in the
    folder; empty in format 1.
    """

    step: int
    ranks: int
    sequence: int = 1
    arithmetic: str | None = None
    counts: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    format: int = FORMAT

    def changed_ranks(self, ranks: int, sequence: int) -> str:
        """Return how the processes of a run that resumes the checkpoint differ from those that wrote it, or ""."""
        pairs = (("ranks", self.ranks, ranks), ("parallel.sequence", self.sequence, sequence))
        return ", ".join(f"{name} {old} -> {new}" for name, old, new in pairs if old != new)


def is_run_checkpoint(path: Path) -> bool:
    """Return whether a folder is a `step_...` folder of a run."""
    return (path / STATE_FILE).is_file()


def exported_model(path: Path) -> Path | None:
    """Return the model folder that the run of a checkpoint has exported, which has the other parts; None if missing."""
    exported = path.resolve().parent.parent / "model"
    return exported if exported.is_dir() else None


def encode_state(state: RunState) -> str:
    """Return the text of state.json, which includes its own checksum."""
    values = asdict(state)
    return json.dumps(values | {"checksum": _checksum(values)}, indent=1) + "\n"


def read_state(folder: Path) -> RunState:
    """Read state.json. Raises DamagedError if its checksum differs, and CheckpointError for a newer format."""
    file = folder / STATE_FILE
    try:
        values = read_json(file)
    except (CheckpointError, OSError) as error:
        raise DamagedError(f"{folder} is damaged: {error}") from error
    if not {"format", "checksum"} & values.keys():
        return _state_of_format_1(folder, values)
    checksum = values.pop("checksum", None)
    if checksum != _checksum(values):
        raise DamagedError(f"{folder} is damaged: {file} has changed since it was written (its checksum differs)")
    if values["format"] != FORMAT:
        raise CheckpointError(
            f"{folder} has format {values['format']} of a newer longvideo; this version reads formats up to {FORMAT};"
            " update longvideo"
        )
    files = {name: FileRecord(**record) for name, record in values.pop("files").items()}  # type: ignore[attr-defined]
    return RunState(**values, files=files)  # type: ignore[arg-type]


def find_damage(folder: Path, files: Mapping[str, FileRecord]) -> str | None:
    """Compare files with their records, several in parallel; return what is wrong with the first that differs."""
    with ThreadPoolExecutor(min(HASH_THREADS, os.cpu_count() or 1)) as pool:
        problems = pool.map(partial(_damage_of, folder), files.items())
        return next((problem for problem in problems if problem), None)


def open_tensors(folder: Path, state: RunState, parts: Collection[str] = (*PARTS, OTHERS)) -> Weights:
    """Open the tensors of trained parameters. parts: keys of PARTS, or OTHERS. Raises DamagedError."""
    try:
        if state.format == 1:
            return _tensors_of_format_1(folder, [part for part in parts if part in PARTS])
        names = [name for name in state.files if name.split("_")[0] in parts]
        return join([safetensors_file.open_file(folder / name) for name in names])
    except CheckpointError as error:
        raise DamagedError(f"{folder} is damaged: {error}") from error


def open_recipes(folder: Path, state: RunState) -> list[Weights]:
    """Open the state of each rank's recipe, in the order of ranks. Raises DamagedError."""
    try:
        files = [sorted(folder.glob(f"{RECIPE}_{rank:05d}*.safetensors")) for rank in range(state.ranks)]
        return [join([safetensors_file.open_file(file) for file in own]) for own in files]
    except CheckpointError as error:
        raise DamagedError(f"{folder} is damaged: {error}") from error


def open_run_checkpoint(path: Path, entry: str | None, marks: Iterable[str]) -> tuple[list[Weights], dict[str, str]]:
    """Open the weights that a run trained, one set for every module, and return them with notes on their origin.

    entry: "ema", the running average, which a run exports and which is the default, or "weights". marks: names of
    tensors that identify modules. Raises CheckpointError for another entry, for damage, and for a distillation, whose
    checkpoints contain LoRA.
    """
    entry = entry or AVERAGED
    if entry not in ENTRIES:
        raise CheckpointError(f"{path} has no entry {entry!r}; use {' or '.join(ENTRIES)}")
    state = read_state(path)
    files = {name: record for name, record in state.files.items() if name.split("_")[0] == entry}
    if problem := find_damage(path, files):
        raise DamagedError(f"{path} is damaged: {problem}")
    weights = open_tensors(path, state, [entry])
    if any(name.startswith(tuple(f"{role}/" for role in ROLES)) for name in weights.infos):
        raise CheckpointError(f"{path} is a checkpoint of a distillation; use lora/ of its run folder")
    weights = _of_kind(weights, PARTS[entry][0])
    prefixes = {name.removesuffix(mark) for mark in marks for name in weights.infos if _ends_with(name, mark)}
    modules = [_module(weights, prefix) for prefix in sorted(prefixes)]
    if not modules:
        raise CheckpointError(
            f"{weights.label}: its tensors ({listing(weights.infos)}) belong to no part of a Wan model"
        )
    return modules, {"entry": entry, "step": str(state.step)}


def _checksum(values: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _damage_of(folder: Path, item: tuple[str, FileRecord]) -> str | None:
    file, record = folder / item[0], item[1]
    digest, buffer = hashlib.sha256(), bytearray(HASH_BYTES)
    try:
        size = file.stat().st_size
        if size != record.num_bytes:
            return f"{file} has {size} bytes, but {record.num_bytes} were written"
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
    except OSError as error:
        return f"{file} cannot be read: {reason(error)}"
    if digest.hexdigest() != record.sha256:
        return f"{file} has changed since it was written (its SHA-256 differs)"
    return None


def _state_of_format_1(folder: Path, values: Mapping[str, object]) -> RunState:
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
    step, ranks = numbers.pop("step", None), numbers.pop("ranks", 1)
    if not isinstance(step, int) or not isinstance(ranks, int):
        raise DamagedError(f"{folder} is damaged: {folder / STATE_FILE} has no step")
    return RunState(step=step, ranks=ranks, counts=numbers, format=1)


def _tensors_of_format_1(folder: Path, parts: Collection[str]) -> Weights:
    of_roles = [role for role in ROLES if (folder / role).is_dir()]
    if of_roles:
        both = {role: _tensors_of_format_1(folder / role, parts) for role in of_roles}
        return join([tensors.renamed(f"{role}/{{}}".format) for role, tensors in both.items()])
    files = sorted(folder.glob("rank_*.safetensors"))
    if not files:
        return _tensors_of_one_process(folder, parts)
    everything = join([safetensors_file.open_file(file) for file in files])
    kinds = [kind for part in parts for kind in PARTS[part]]
    own = {name: x for name, x in everything.tensors.items() if name.rpartition("/")[2] in kinds}
    if STEP in kinds:
        count = read_json(folder / "index.json").get("adam_step")
        if not isinstance(count, int | float):
            raise CheckpointError(f"{folder / 'index.json'} has no adam_step")
        step = InMemory(torch.tensor(float(count)))
        own |= {f"{name.rpartition('/')[0]}/{STEP}": step for name in own}
    return Weights(own, everything.files)


def _tensors_of_one_process(folder: Path, parts: Collection[str]) -> Weights:
    opened: list[Weights] = []
    for part in parts:
        tensors = safetensors_file.open_file(folder / f"{part}.safetensors")
        kinds = PARTS[part]
        opened.append(tensors if STEP in kinds else tensors.renamed(f"{{}}/{kinds[0]}".format))
    return join(opened)


def _of_kind(weights: Weights, kind: str) -> Weights:
    suffix = f"/{kind}"
    own = {name.removesuffix(suffix): x for name, x in weights.tensors.items() if name.endswith(suffix)}
    return Weights(own, weights.files)


def _ends_with(name: str, mark: str) -> bool:
    return name == mark or name.endswith(f".{mark}")


def _module(weights: Weights, prefix: str) -> Weights:
    own = {name.removeprefix(prefix): x for name, x in weights.tensors.items() if name.startswith(prefix)}
    return Weights(own, weights.files)
