"""Options that the training commands have in common, and the start of a run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longvideo.cli.output import OUTPUT
from longvideo.machine.launcher import is_main_process
from longvideo.training.options import ResumeChoice, RunOptions

if TYPE_CHECKING:
    from longvideo.training.run import BuildEngine, BuildRecipe

Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CONFIG|KEY=VALUE",
        help="A YAML file or the name of a preset, then settings that replace its values, such as"
        " `optimizer.learning_rate=5e-4` or `stages[0].steps=500`.",
    ),
]
Out = Annotated[Path, typer.Option(*OUTPUT, help="Run folder: checkpoints, metrics, samples and the model.")]
Resume = Annotated[
    ResumeChoice,
    typer.Option(
        help="`auto` resumes from the newest checkpoint in the run folder; `never` refuses a folder that holds a run.",
    ),
]
MaxMinutes = Annotated[
    float | None,
    typer.Option(help="Minutes after which the run saves, exports its model and stops. The same command resumes it."),
]
Device = Annotated[
    str | None, typer.Option(help="`cuda`, `cuda:N` or `cpu`.  [default: the GPU if there is one]", show_default=False)
]
DryRun = Annotated[
    int | None,
    typer.Option(
        "--dry-run",
        metavar="STEPS",
        min=1,
        show_default=False,
        help="Time this many steps of each stage, write nothing, and end.",
    ),
]
Trace = Annotated[
    bool, typer.Option("--trace", help="With `--dry-run`: also list the operations that take the most time.")
]


def training_command(run: Callable[[RunOptions], None], *, command: str, folder: str) -> Callable[..., None]:
    """Return a function whose parameters are the options of a training command, for `typer`.

    run: train with these options; its docstring is the help text. command: words after `longvideo`. folder: default run
    folder.
    """

    def with_options(
        arguments: Arguments = None,
        out: Out = Path(folder),
        resume: Resume = "auto",
        max_minutes: MaxMinutes = None,
        device: Device = None,
        dry_run: DryRun = None,
        trace: Trace = False,
    ) -> None:
        run(
            RunOptions(
                command=command,
                folder=out,
                arguments=tuple(arguments or ()),
                resume=resume,
                max_minutes=max_minutes,
                device=device,
                dry_run=dry_run or 0,
                trace=trace,
            )
        )

    with_options.__doc__, with_options.__name__ = run.__doc__, run.__name__
    return with_options


def train(
    options: RunOptions,
    schema: type,
    build: BuildRecipe,
    *,
    default_config: str,
    build_engine: BuildEngine | None = None,
) -> None:
    """Read a configuration and run the training that it describes.

    schema: dataclass of the configuration. build, build_engine: see `longvideo.training.run.run`. default_config:
    preset to use where the command line names no configuration.
    """
    from longvideo.config.loading import find_config, load_config

    files = [find_config(name) for name in options.configs or [default_config]]
    config = load_config(schema, files, options.overrides)
    if shipped := shipped_models(config, options.overrides):
        config = dataclasses.replace(config, **shipped)

    from longvideo.training.run import run
    from longvideo.training.stopping import RunStopped

    try:
        run(config, options, build, build_engine=build_engine)
    except RunStopped as stopped:
        raise typer.Exit(stopped.exit_code) from stopped


def shipped_models(config: Any, overrides: Sequence[str]) -> dict[str, str]:
    """Return packaged models for the keys whose folder does not exist, unless an override names that folder.

    config: configuration of a training, with the packaged models in `shipped` where it starts from earlier runs.
    """
    from longvideo.config.loading import sets_key

    models: dict[str, str] = {}
    for key, model in getattr(config, "shipped", {}).items():
        named = getattr(config, key, None)
        if (
            named is not None
            and os.sep in named
            and not Path(named).exists()
            and not sets_key(key, overrides=overrides)
        ):
            models[key] = model
            if is_main_process():
                print(f"{key}: {named} does not exist; the packaged model {model} is used instead", flush=True)
    return models
