"""What the training commands share: their options, and how one is started."""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longvideo.cli.logs import show_messages
from longvideo.cli.output import OUTPUT
from longvideo.errors import ConfigError, UserError

if TYPE_CHECKING:
    import torch

    from longvideo.training.engine import Engine
    from longvideo.training.trainer import Recipe

EXIT_USER_ERROR = 2

Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG] [KEY=VALUE]...",
        help="A YAML file or the name of a packaged one, then settings that replace its own, such as"
        " `optimizer.learning_rate=5e-4` or `stages[0].steps=500`.",
    ),
]
Out = Annotated[Path, typer.Option(*OUTPUT, help="Run folder: checkpoints, metrics, samples and the model.")]
Resume = Annotated[
    str,
    typer.Option(help="`auto` resumes from the newest checkpoint in the folder; `never` refuses one that holds a run."),
]
MaxMinutes = Annotated[
    float | None, typer.Option(help="Stop in time, save and export, ready to be resumed by the same command.")
]
Device = Annotated[str | None, typer.Option(help="`cuda`, `cuda:1` or `cpu`; the GPU if there is one.")]
DryRun = Annotated[
    int, typer.Option("--dry-run", metavar="STEPS", help="Time this many steps of each stage, write nothing, and end.")
]
Trace = Annotated[bool, typer.Option(help="With `--dry-run`: also list the operations that take longest.")]


@dataclass(frozen=True)
class Options:
    """What every training command is told, in the order of its parameters."""

    arguments: list[str]
    out: Path
    resume: str
    max_minutes: float | None
    device: str | None
    dry_run: int
    trace: bool

    def __post_init__(self) -> None:
        if self.max_minutes is not None and not 0 < self.max_minutes < math.inf:
            raise ConfigError(f"--max-minutes {self.max_minutes} must be above 0")
        if self.dry_run < 0:
            raise ConfigError(f"--dry-run {self.dry_run} must be at least 1, or be left out")

    @property
    def overrides(self) -> list[str]:
        return [argument for argument in self.arguments if "=" in argument]

    @property
    def configs(self) -> list[str]:
        return [argument for argument in self.arguments if "=" not in argument]

    def resume_command(self, command: str) -> str:
        """Return what resumes the run. command: words after `longvideo`, such as "train ar"."""
        words = [*self.arguments, "--out", str(self.out)]
        if self.device is not None:
            words += ["--device", self.device]
        if self.max_minutes is not None:
            words += ["--max-minutes", f"{self.max_minutes:g}"]
        return f"{_start(command)} {shlex.join(words)}"


def train(
    command: str,
    schema: type,
    build: Callable[..., Recipe],
    default_config: str,
    options: Options,
    *,
    build_engine: Callable[..., Engine] | None = None,
) -> None:
    """Read the configuration, and train what it says. command: words after `longvideo` that start it."""
    began = time.monotonic()
    from longvideo.config.loading import find_config, load_config, to_yaml

    files = [find_config(name) for name in options.configs or [default_config]]
    config = load_config(schema, files, options.overrides)
    if shipped := shipped_models(config, options.overrides):
        config = load_config(schema, files, [*options.overrides, *(f"{key}={model}" for key, model in shipped.items())])

    from longvideo.training.run import RunOptions, run
    from longvideo.training.stopping import RunStopped

    minutes = options.max_minutes
    try:
        run(
            config,
            build,
            choose_device(options.device),
            options.out,
            RunOptions(
                resume_command=options.resume_command(command),
                config_text=to_yaml(config),
                resume=options.resume,
                deadline=math.inf if minutes is None else began + 60 * minutes,
                dry_run=options.dry_run,
                trace=options.trace,
            ),
            build_engine=build_engine,
        )
    except RunStopped as stopped:
        raise typer.Exit(stopped.exit_code) from stopped


def shipped_models(config: Any, overrides: Sequence[str]) -> dict[str, str]:
    """Return packaged models by the keys whose folder is not there, as far as files and not overrides name it.

    config: with `shipped`, or without, as where no earlier run has to make a model first.
    """
    from longvideo.config.loading import sets_key
    from longvideo.distributed import is_main_process

    found = {}
    for key, model in getattr(config, "shipped", {}).items():
        named = getattr(config, key, None)
        if (
            named is not None
            and os.sep in named
            and not Path(named).exists()
            and not sets_key(key, overrides=overrides)
        ):
            found[key] = model
            if is_main_process():
                print(f"{key}: {named} is not there; the packaged {model} takes its place", flush=True)
    return found


def main(command: Callable[..., None]) -> None:
    """Run a training command in one of the processes of a launcher, and end this process as `longvideo` does."""
    from longvideo.distributed import RefusedByMain, is_main_process
    from longvideo.training.lost_ranks import LostRank

    show_messages(is_main=is_main_process())
    try:
        typer.run(command)
    except RefusedByMain:
        raise SystemExit(EXIT_USER_ERROR) from None
    except LostRank as error:
        if error.is_speaker:
            _print_error(error)
        # an ordinary end would wait for what a device still exchanges with the lost rank
        os._exit(EXIT_USER_ERROR)
    except UserError as error:
        _print_error(error)
        raise SystemExit(EXIT_USER_ERROR) from error


def _print_error(error: UserError) -> None:
    sys.stdout.flush()
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def _start(command: str) -> str:
    """Return the words that start a command as it was started: alone, or by a launcher."""
    from longvideo.distributed import launched

    if not launched():
        return f"longvideo {command}"
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    nodes = f"--nnodes {world // local} " if world > local else ""
    return f"torchrun {nodes}--nproc-per-node {local} -m longvideo.{command.split()[0]}"


def choose_device(name: str | None) -> torch.device:
    """Return the device of this process and make it torch's own. Raises ConfigError where there is none such."""
    import torch

    from longvideo.distributed import launched

    try:
        own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        device = torch.device(name or (own if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"--device {name} is not a device; use cuda, cuda:N or cpu") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"--device {name}: torch sees no CUDA device here; use --device cpu")
        if launched():
            # the optimiser wants one piece as large as all weights, which a divided heap has not
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    return device
