"""The folder of a run: its lock, and the files that are written when a run starts."""

from __future__ import annotations

import shlex
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from longvideo.errors import ConfigError, UserError
from longvideo.files import locked, write_json, write_text
from longvideo.training.config_changes import changes_line
from longvideo.training.run_log import METRICS_FILE, environment

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    import torch

    from longvideo.distributed import Mesh
    from longvideo.training.options import ResumeChoice

LOCK_FILE = "run.lock"
CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
CHECKPOINTS, MODEL = "checkpoints", "model"
PRIVATE = 0o700
"""Permissions of a run folder: its owner's alone."""


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


def write_record(folder: Path, config_text: str, device: torch.device) -> str | None:
    """Write the configuration of a run that was accepted, and a description of its environment.

    Return a line with the settings that differ from those of the last start, or None if none does.
    """
    changes = changes_line(folder / CONFIG_FILE, config_text)
    write_text(folder / CONFIG_FILE, config_text)
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


@contextmanager
def _created(folder: Path) -> Generator[None]:
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=PRIVATE, exist_ok=True)
    try:
        yield
    finally:
        for path in created:
            with suppress(OSError):
                path.rmdir()  # fails unless the folder is empty
