"""What the training commands share: their options, and how one is started."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longvideo.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from longvideo.training.engine import Engine
    from longvideo.training.trainer import Recipe

Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG] [KEY=VALUE]...",
        help="A YAML file or the name of a packaged one, then settings that replace its own, such as"
        " `optimizer.learning_rate=5e-4` or `stages[0].steps=500`.",
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Run folder: checkpoints, metrics, samples and the model.")]
Resume = Annotated[
    str, typer.Option(help="`auto` goes on from the newest checkpoint in the run folder; `never` refuses to.")
]
MaxMinutes = Annotated[
    float | None, typer.Option(help="Stop in time, save and export, ready to be resumed by the same command.")
]
Device = Annotated[str | None, typer.Option(help="`cuda`, `cuda:1` or `cpu`; the GPU if there is one.")]
DryRun = Annotated[
    int, typer.Option("--dry-run", metavar="STEPS", help="Time this many steps of each stage, write nothing, and end.")
]
Trace = Annotated[bool, typer.Option(help="With `--dry-run`: also list the operations that take longest.")]


def train(
    schema: type,
    build: Callable[..., Recipe],
    default_config: str,
    arguments: list[str],
    out: Path,
    resume: str,
    max_minutes: float | None,
    device: str | None,
    dry_run: int,
    trace: bool,
    *,
    build_engine: Callable[..., Engine] | None = None,
) -> None:
    """Read the configuration, and train what it says; the arguments are those of the command line, in its order."""
    began = time.monotonic()
    if max_minutes is not None and max_minutes <= 0:
        raise ConfigError(f"--max-minutes {max_minutes} must be above 0")
    from longvideo.config import find_config, load_config, to_yaml

    overrides = [argument for argument in arguments if "=" in argument]
    names = [argument for argument in arguments if "=" not in argument] or [default_config]
    files = [find_config(name) for name in names]
    config = load_config(schema, files, overrides)

    from longvideo.training.run import run

    run(
        config,
        build,
        choose_device(device),
        out,
        config_text=to_yaml(config),
        resume=resume,
        deadline=began + 60 * max_minutes if max_minutes is not None else math.inf,
        dry_run=dry_run,
        trace=trace,
        build_engine=build_engine,
    )


def choose_device(name: str | None) -> torch.device:
    """Return the device of this process and make it torch's own. Raises ConfigError where there is none such."""
    import torch

    from longvideo.training.mesh import launched

    try:
        own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        device = torch.device(name or (own if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"--device {name} is no device; use cuda, cuda:N or cpu") from error
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
