"""Complete, atomic checkpoints of a run: a folder is either whole or not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from longvideo.errors import CheckpointError
from longvideo.training.mesh import Mesh

PREFIX = "step_"
STATE_FILE = "state.json"


@dataclass(frozen=True)
class Found:
    """A whole checkpoint on disk. Batches depend on seed and step alone, so these numbers and its files are all."""

    folder: Path
    step: int
    state: Mapping[str, float | int | str]


class CheckpointFolder:
    """The checkpoints of one run, `step_0001200/` and so on; the newest `keep` stay. All ranks see the same folder."""

    def __init__(self, folder: Path, *, keep: int, mesh: Mesh | None = None):
        self.folder = folder
        self.keep = keep
        self.mesh = mesh or Mesh()

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, oldest first."""
        found = self.folder.glob(f"{PREFIX}*/{STATE_FILE}")
        return sorted(int(path.parent.name.removeprefix(PREFIX)) for path in found)

    def save(self, step: int, write: Callable[[Path], None], state: Mapping[str, float | int | str]) -> Path:
        """Let every rank write its files under a temporary name, flush to disk, rename; then remove the oldest ones.

        Raises CheckpointError when there is no room, with the checkpoints before left as they were.
        """
        target = self.folder / f"{PREFIX}{step:07d}"
        temporary = self.folder / f".{target.name}.part"
        try:
            if self.mesh.is_main:
                self.folder.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
            self.mesh.barrier()
            write(temporary)
            self.mesh.barrier()
            if self.mesh.is_main:
                (temporary / STATE_FILE).write_text(json.dumps({"step": step, **state}, indent=1))
                for path in (*temporary.rglob("*"), temporary):
                    _flush(path)
                if target.exists():
                    shutil.rmtree(target)
                temporary.rename(target)
                _flush(self.folder)
                for old in self.steps()[: -self.keep]:
                    shutil.rmtree(self.folder / f"{PREFIX}{old:07d}")
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            whole = self.steps()
            left = f"the newest whole one is of step {whole[-1]}" if whole else "there is none yet"
            raise CheckpointError(f"cannot write the checkpoint of step {step}: {error}; {left}") from error
        self.mesh.barrier()
        return target

    def newest(self) -> Found | None:
        """Return the newest complete checkpoint, or None; raises CheckpointError when it is damaged."""
        steps = self.steps()
        if not steps:
            return None
        folder = self.folder / f"{PREFIX}{steps[-1]:07d}"
        try:
            state = json.loads((folder / STATE_FILE).read_text())
            return Found(folder, state.pop("step"), state)
        except (OSError, json.JSONDecodeError, KeyError) as error:
            raise CheckpointError(f"{folder} is damaged ({error}); remove it to resume from the one before") from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
