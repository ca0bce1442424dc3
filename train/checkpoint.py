"""Complete, atomic checkpoints of a run: a folder is either whole or not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from longvideo.errors import CheckpointError

PARTS = ("weights", "optimizer", "ema")
PREFIX = "step_"


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on as if it had never stopped. Batches depend on seed and step alone."""

    step: int
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    state: Mapping[str, float | int | str]


class CheckpointFolder:
    """The checkpoints of one run, `step_0001200/` and so on; the newest `keep` stay."""

    def __init__(self, folder: Path, *, keep: int):
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, oldest first."""
        found = self.folder.glob(f"{PREFIX}*/state.json")
        return sorted(int(path.parent.name.removeprefix(PREFIX)) for path in found)

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write under a temporary name, flush to disk, rename; then remove the oldest ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"{PREFIX}{checkpoint.step:07d}"
        temporary = self.folder / f".{target.name}.part"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for part in PARTS:
            tensors = {name: tensor.detach().contiguous() for name, tensor in getattr(checkpoint, part).items()}
            save_file(tensors, temporary / f"{part}.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": checkpoint.step, **checkpoint.state}, indent=1))
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        _flush(self.folder)
        for step in self.steps()[: -self.keep]:
            shutil.rmtree(self.folder / f"{PREFIX}{step:07d}")
        return target

    def load_newest(self) -> Checkpoint | None:
        """Return the newest complete checkpoint, on the CPU, or None; raises CheckpointError when it is damaged."""
        steps = self.steps()
        if not steps:
            return None
        folder = self.folder / f"{PREFIX}{steps[-1]:07d}"
        try:
            state = json.loads((folder / "state.json").read_text())
            parts = {part: load_file(folder / f"{part}.safetensors") for part in PARTS}
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{folder} is damaged ({error}); remove it to resume from the one before") from error
        return Checkpoint(step=state.pop("step"), state=state, **parts)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
