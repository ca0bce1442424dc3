"""Read the checkpoints that training writes, of one process or of many, as weights of a transformer or autoencoder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from longvideo.checkpoint.opening import join, open_weights
from longvideo.checkpoint.tensors import Weights, listing
from longvideo.errors import CheckpointError
from longvideo.files import read_json

STATE_FILE = "state.json"
AVERAGED, TRAINED = "ema", "weights"
ENTRIES = (AVERAGED, TRAINED)
KIND_OF = {AVERAGED: "average", TRAINED: "weight"}
"""What the files of many processes call the two, behind a slash at the end of a name."""


def is_run_checkpoint(path: Path) -> bool:
    """Say whether a folder is a `step_...` folder of a run."""
    return (path / STATE_FILE).is_file()


def exported_model(path: Path) -> Path | None:
    """Return the model folder that the run of a checkpoint has written, if it has; it knows the other parts."""
    exported = path.resolve().parent.parent / "model"
    return exported if exported.is_dir() else None


def open_run_checkpoint(path: Path, entry: str | None, marks: Iterable[str]) -> tuple[list[Weights], dict[str, str]]:
    """Open what a run trained, one set of weights for every module that a mark belongs to, and the notes beside.

    entry: "ema", the running average, which is what a run exports, or "weights". marks: names of tensors by which
    modules are known. Raises CheckpointError for another entry, and for a distillation, whose checkpoints hold LoRA.
    """
    entry = entry or AVERAGED
    if entry not in ENTRIES:
        raise CheckpointError(f"{path} has no entry {entry!r}; it has {' and '.join(ENTRIES)}")
    if (path / "student").is_dir():
        raise CheckpointError(f"{path} is of a distillation; what it has learned so far is in lora/ of its run folder")
    many = sorted(path.glob("rank_*.safetensors"))
    if many:
        everything, suffix = join([open_weights(file) for file in many]), f"/{KIND_OF[entry]}"
        own = {name.removesuffix(suffix): x for name, x in everything.tensors.items() if name.endswith(suffix)}
        weights = Weights(own, everything.files)
    else:
        weights = open_weights(path / f"{entry}.safetensors")
    prefixes = {name.removesuffix(mark) for mark in marks for name in weights.infos if _ends_with(name, mark)}
    modules = [_module(weights, prefix) for prefix in sorted(prefixes)]
    if not modules:
        raise CheckpointError(f"{weights.label}: its tensors ({listing(weights.infos)}) are of no part of a Wan model")
    state = read_json(path / STATE_FILE)
    return modules, {"entry": entry, "step": str(state.get("step", "unknown"))}


def _ends_with(name: str, mark: str) -> bool:
    return name == mark or name.endswith(f".{mark}")


def _module(weights: Weights, prefix: str) -> Weights:
    own = {name.removeprefix(prefix): x for name, x in weights.tensors.items() if name.startswith(prefix)}
    return Weights(own, weights.files)
