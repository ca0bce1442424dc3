"""The folder of a run: its lock, and the files that are written when a run starts."""

from __future__ import annotations

import os
import shlex
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from longvideo.errors import ConfigError, UserError
from longvideo.files import LOCK_SUFFIX, TEMPORARY_SUFFIX, locked, write_json, write_text
from longvideo.permissions import PRIVATE_FOLDER, make_private, private_umask
from longvideo.training.config_changes import changes_line
from longvideo.training.run_log import METRICS_FILE, TENSORBOARD, WANDB, WANDB_ID_FILE, environment

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    import torch

    from longvideo.distributed import Mesh
    from longvideo.training.options import ResumeChoice

LOCK_FILE = "run.lock"
CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
EXPORTED_FILE = "exported.json"
CHECKPOINTS, MODEL, LORA, SAMPLES = "checkpoints", "model", "lora", "samples"
MODEL_BF16 = "model_bf16"
OWN_NAMES = frozenset(
    {LOCK_FILE, CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE, EXPORTED_FILE, CHECKPOINTS, MODEL, LORA, SAMPLES}
    | {MODEL_BF16, TENSORBOARD, WANDB, WANDB_ID_FILE}
)
"""Names of everything that a run writes into its folder."""


@contextmanager
def claimed(folder: Path, mesh: Mesh, *, resume: ResumeChoice) -> Generator[None]:
    """Hold a run folder for the processes of one run; its contents stay as they are.

    A missing folder is created, readable by its owner alone, and removed again if nothing was written into it. Raises
    BusyError if another run holds it, and ConfigError if it holds a run and resume is "never", on all ranks.
    """
    with ExitStack() as stack:
        refusal = None
        if mesh.is_main:
            try:
                _check_resume(folder, resume)
                stack.enter_context(_created(folder))
                busy = f"another run uses {folder}; stop it, or use another --output"
                stack.enter_context(locked(folder / LOCK_FILE, busy=busy))
            except (UserError, OSError) as error:
                refusal = error
        mesh.share_refusal(refusal)
        yield


@contextmanager
def private(folder: Path, mesh: Mesh) -> Generator[None]:
    """Make the folder of a run that was accepted private to its user, and what the process writes in the block.

    Existing files and folders of a run become private as well. Other files in the folder are not changed; if there are
    any, neither is the folder itself. Links, and files and folders of other users, are not changed.
    """
    with private_umask():
        if mesh.is_main:
            entries = list(folder.iterdir())
            own = [path for path in entries if _is_own(path.name)]
            paths = [path for path in own if not path.is_symlink()]
            if len(own) == len(entries):
                paths.append(folder)
            for path in paths:
                if path.stat().st_uid == os.geteuid():
                    make_private(path)
        yield


def write_record(folder: Path, config_text: str, device: torch.device) -> str | None:
    """Write the configuration of a run that was accepted, and a description of its environment.

    The record of the export is removed first if the configuration is another one, so that the model is exported again.
    Return a line with the settings that differ from those of the last start, or None if none does.
    """
    file = folder / CONFIG_FILE
    changes = changes_line(file, config_text)
    if changes is not None or not file.exists():
        (folder / EXPORTED_FILE).unlink(missing_ok=True)
    write_text(file, config_text)
    write_json(folder / ENVIRONMENT_FILE, environment(device), indent=1)
    return changes


def describe_model(folder: Path) -> list[str]:
    """Return lines with the place of a finished run's model and the command that makes a video with it."""
    model = folder / MODEL
    command = shlex.join(["longvideo", "generate", "a red ball bounces", "--model", str(model), "-o", "ball.mp4"])
    return [f"model: {model}", f"next: {command}"]


def _check_resume(folder: Path, resume: ResumeChoice) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output {folder} is a file; expected a folder; use another name")
    holds = [name for name in (CHECKPOINTS, MODEL, METRICS_FILE) if (folder / name).exists()]
    if resume == "never" and holds:
        raise ConfigError(f"{folder} already holds a run ({', '.join(holds)}); use --resume auto or another --output")


def _is_own(name: str) -> bool:
    return name in OWN_NAMES or (name.startswith(".") and name.endswith((TEMPORARY_SUFFIX, LOCK_SUFFIX)))


@contextmanager
def _created(folder: Path) -> Generator[None]:
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)
    try:
        yield
    finally:
        for path in created:
            with suppress(OSError):
                path.rmdir()  # fails unless the folder is empty
