"""The log of a run: a line for each log step, metrics.jsonl, TensorBoard and wandb on request, and the environment."""

from __future__ import annotations

import json
import platform
import resource
import secrets
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from longvideo import __version__
from longvideo.errors import ConfigError
from longvideo.files import append_line, read_text, write_file, write_text
from longvideo.machine.packages import require

METRICS_FILE = "metrics.jsonl"
TENSORBOARD, WANDB, WANDB_ID_FILE = "tensorboard", "wandb", "wandb.id"


@dataclass(frozen=True)
class StepReport:
    """Means since the last log line.

    step: number of steps since the beginning of the run. gradient_norm: norm before it is clipped. learning_rate: that
    of the last step. seconds: duration of a step. rate: units per second. unit: what `rate` counts. memory_gib: peak
    memory. metrics: other means, by name.
    """

    step: int
    total_steps: int
    loss: float
    gradient_norm: float
    learning_rate: float
    seconds: float
    rate: float
    unit: str
    memory_gib: float
    metrics: Mapping[str, float]

    def line(self) -> str:
        """Return the line for the terminal."""
        eta = _duration((self.total_steps - self.step) * self.seconds)
        parts = [
            f"step {self.step}/{self.total_steps}",
            f"loss {self.loss:.4f}",
            f"grad {self.gradient_norm:.2f}",
            f"lr {self.learning_rate:.1e}",
            f"{self.seconds:.2f} s" if self.seconds >= 0.1 else f"{self.seconds * 1000:.1f} ms",
            f"{_thousands(self.rate)} {self.unit}/s",
            f"{self.memory_gib:.1f} GiB",
            f"eta {eta}",
        ]
        parts += [f"{name} {value:.4g}" for name, value in self.metrics.items()]
        return " | ".join(parts)

    def record(self) -> dict[str, float]:
        """Return the numbers for `metrics.jsonl`."""
        return {
            "step": self.step,
            "loss": self.loss,
            "grad": self.gradient_norm,
            "lr": self.learning_rate,
            "seconds": self.seconds,
            f"{self.unit}/s": self.rate,
            "memory_gib": self.memory_gib,
            **self.metrics,
        }


class RunLog:
    """Writes the log of a run into a folder. A resumed run first drops the records after the step it resumes from."""

    def __init__(
        self,
        folder: Path,
        *,
        tensorboard: bool = False,
        wandb: str | None = None,
        start_step: int = 0,
        enabled: bool = True,
    ) -> None:
        """wandb: project to report to. enabled: whether this rank writes the log; others write nothing."""
        self.enabled = enabled
        self.path = folder / METRICS_FILE
        self._board: Any = None
        self._wandb: Any = None
        if not enabled:
            return
        if self.path.exists() and (dropped := _keep_until(self.path, start_step)):
            self.note(f"{self.path}: dropped {dropped} lines that are not records of a step")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / TENSORBOARD), purge_step=start_step + 1)
        if wandb is not None:
            self._wandb = _start_wandb(folder, wandb)

    def step(self, report: StepReport) -> None:
        """Print the line of a report and append its record."""
        self.note(report.line())
        self.record(report.record())

    def record(self, values: Mapping[str, float]) -> None:
        """Append one line of numbers; `step` must be among them."""
        if not self.enabled:
            return
        append_line(self.path, json.dumps(dict(values)))
        if self._board is not None:
            for name, value in values.items():
                if name != "step":
                    self._board.add_scalar(name, value, int(values["step"]))
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log(dict(values))

    def close(self) -> None:
        """End the reports; `metrics.jsonl` is whole after every record."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def note(self, text: str) -> None:
        """Print a line."""
        if self.enabled:
            with suppress(OSError):  # the terminal, or the reader of a pipe, may be gone; the run continues
                print(text, flush=True)


def check_reporting(tensorboard: bool, wandb: str | None) -> None:
    """Raise UserError, with the package to install, if a package is missing that the run reports through."""
    if tensorboard:
        require("tensorboard", extra="train", purpose="trainer.tensorboard")
    if wandb is not None:
        require("wandb", extra="wandb", purpose="trainer.wandb")


def environment(device: torch.device) -> dict[str, str]:
    """Return versions, device, command, and the git commit of an editable install, for the record."""
    return {
        "longvideo": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "cuda": torch.version.cuda or "none",
        "command": " ".join(sys.argv[1:]),
        **commit_facts(Path(__file__).resolve()),
    }


def commit_facts(file: Path) -> dict[str, str]:
    """Return `commit` and `changed`, the changed files, of the repository that a file belongs to.

    Both are "unknown" for a file that no repository tracks, such as one of a wheel installed inside another project.
    """
    is_tracked = _git(file.parent, ["ls-files", "--error-unmatch", file.name]) is not None
    commands = {"commit": ["rev-parse", "HEAD"], "changed": ["status", "--porcelain"]}
    facts = {name: _git(file.parent, command) if is_tracked else None for name, command in commands.items()}
    return {name: "unknown" if text is None else text for name, text in facts.items()}


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak of the memory that torch holds on a CUDA device, or of the process on a CPU, GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def _start_wandb(folder: Path, project: str) -> Any:
    """Start a run, or resume the one whose id the folder holds."""
    import wandb

    id_file = folder / WANDB_ID_FILE
    if not id_file.exists():
        write_text(id_file, secrets.token_hex(4))
    config = folder / "config.yaml"
    try:
        run = wandb.init(
            project=project,
            name=folder.resolve().name,
            id=read_text(id_file, what="id of the wandb run").strip(),
            resume="allow",
            dir=str(folder),
            config=yaml.safe_load(read_text(config, what="configuration")) if config.exists() else None,
        )
    except wandb.Error as error:
        raise ConfigError(
            f"wandb cannot start a run of trainer.wandb={project}: {error}; log in with `wandb login`, or set"
            " WANDB_MODE=offline"
        ) from error
    # a resumed run may log steps again
    run.define_metric("*", step_metric="step")
    return run


def _git(folder: Path, command: list[str]) -> str | None:
    """Return the output of git in a folder, or None if git fails or is missing."""
    try:
        result = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _keep_until(path: Path, last_step: int) -> int:
    """Keep the records of a run up to a step; return the number of dropped lines that are not records."""
    dropped = 0

    def write(target: Path) -> None:
        nonlocal dropped
        with path.open("rb") as source, target.open("wb") as kept:
            for line in source:
                step = _step_of(line)
                if step is None:
                    dropped += 1
                elif step <= last_step:
                    kept.write(line.rstrip(b"\r\n") + b"\n")

    write_file(path, write)
    return dropped


def _step_of(line: bytes) -> int | None:
    """Return the step of a line, or None if the line is not the record of a step."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


def _thousands(value: float) -> str:
    for bound, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= bound:
            return f"{value / bound:.1f}{letter}"
    return f"{value:.1f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
