"""`longvideo train vae`, `longvideo train ar`, and the latter under `torchrun -m longvideo.train`."""

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

    from longvideo.train.mesh import Mesh
    from longvideo.train.trainer import Recipe

app = typer.Typer(no_args_is_help=True, help="Train the models: first the autoencoder, then the transformer.")

Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG] [KEY=VALUE]...",
        help="A YAML file or the name of a packaged one (`tiny/vae` or `tiny/ar_opening` when none is given), then"
        " settings that replace its own, such as `optimizer.learning_rate=5e-4` or `stages[0].steps=500`.",
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


@app.command(no_args_is_help=False)
def vae(
    arguments: Arguments = None,
    out: Out = Path("runs/vae"),
    resume: Resume = "auto",
    max_minutes: MaxMinutes = None,
    device: Device = None,
    dry_run: DryRun = 0,
    trace: Trace = False,
) -> None:
    """Train the video autoencoder on ShapeWorld.

    The run folder holds `config.yaml`, `environment.json`, `metrics.jsonl`, `checkpoints/`, `samples/` (given and
    reconstructed clips) and `model/` (the averaged weights, in diffusers' layout, with latent statistics).

    Example: `longvideo train vae tiny/vae --out runs/vae --max-minutes 9`
    """

    def build(config: VaeTraining, target: torch.device, mesh: Mesh) -> Recipe:
        from longvideo.train.vae import VaeRecipe

        if mesh.world > 1:
            raise ConfigError(f"the autoencoder is trained in one process, not in {mesh.world}")
        return VaeRecipe(config, target)

    from longvideo.train.vae import VaeTraining

    _train(VaeTraining, build, "tiny/vae", arguments or [], out, resume, max_minutes, device, dry_run, trace)


@app.command(no_args_is_help=False)
def ar(
    arguments: Arguments = None,
    out: Out = Path("runs/ar"),
    resume: Resume = "auto",
    max_minutes: MaxMinutes = None,
    device: Device = None,
    dry_run: DryRun = 0,
    trace: Trace = False,
) -> None:
    """Train the causal transformer by teacher forcing: on ShapeWorld, or on your own encoded clips.

    A configuration without `data` draws ShapeWorld and trains the text encoder too. The autoencoder comes from a model
    folder, `vae=runs/vae/model` or `vae=tiny`; `initialize=` names one to take the transformer and text encoder from.
    The preset `tiny/ar_opening` trains how videos begin, `tiny/ar` goes on from it with how they continue.

    A configuration with `data`, such as `wan/ar`, trains on a folder that `longvideo data encode` made, from the model
    folder `initialize`. Either runs in many processes:

    `torchrun --nproc-per-node 8 -m longvideo.train wan/ar data=clips initialize=wan parallel.sequence=4`

    The run folder is laid out as that of `train vae`; its `model/` is complete: `longvideo generate --model RUN/model`.

    Example: `longvideo train ar tiny/ar_opening vae=tiny --out runs/ar_opening --max-minutes 9`
    """
    from longvideo.config import find_config, sets_key

    given = arguments or []
    files = [find_config(name) for name in given if "=" not in name]
    if sets_key("data", files, [name for name in given if "=" in name]):
        from longvideo.train.clip_training import ClipTraining

        def build_clips(config: ClipTraining, target: torch.device, mesh: Mesh) -> Recipe:
            from longvideo.train.clip_training import ClipRecipe

            return ClipRecipe(config, target, mesh, dry_run=bool(dry_run))

        _train(ClipTraining, build_clips, "wan/ar", given, out, resume, max_minutes, device, dry_run, trace)
        return

    def build(config: ArTraining, target: torch.device, mesh: Mesh) -> Recipe:
        from longvideo.train.ar import ArRecipe

        return ArRecipe(config, target, mesh)

    from longvideo.train.ar import ArTraining

    _train(ArTraining, build, "tiny/ar_opening", given, out, resume, max_minutes, device, dry_run, trace)


def _train(
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
) -> None:
    began = time.monotonic()
    if max_minutes is not None and max_minutes <= 0:
        raise ConfigError(f"--max-minutes {max_minutes} must be above 0")
    from longvideo.config import find_config, load_config, to_yaml

    overrides = [argument for argument in arguments if "=" in argument]
    names = [argument for argument in arguments if "=" not in argument] or [default_config]
    files = [find_config(name) for name in names]
    config = load_config(schema, files, overrides)

    from longvideo.train.run import run

    run(
        config,
        build,
        _device(device),
        out,
        config_text=to_yaml(config),
        resume=resume,
        deadline=began + 60 * max_minutes if max_minutes is not None else math.inf,
        dry_run=dry_run,
        trace=trace,
    )


def _device(name: str | None) -> torch.device:
    import torch

    from longvideo.train.mesh import launched

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
