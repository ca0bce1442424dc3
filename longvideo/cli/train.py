"""`longvideo train vae`, `longvideo train ar`, and the latter under `torchrun -m longvideo.train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from longvideo.cli.training import Arguments, Device, DryRun, MaxMinutes, Options, Out, Resume, Trace, train
from longvideo.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from longvideo.distributed import Mesh
    from longvideo.training.trainer import Recipe

app = typer.Typer(no_args_is_help=True, help="Train the models: first the autoencoder, then the transformer.")


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

    On a GPU: `longvideo train vae tiny/vae --out runs/vae --max-minutes 9`

    On a CPU, in a minute or two: `longvideo train vae cpu/vae --out runs/try_vae`
    """

    def build(config: VaeTraining, target: torch.device, mesh: Mesh) -> Recipe:
        from longvideo.train.vae.recipe import VaeRecipe

        if mesh.world > 1:
            raise ConfigError(f"the autoencoder is trained in one process, not in {mesh.world}")
        return VaeRecipe(config, target)

    from longvideo.train.vae.recipe import VaeTraining

    options = Options(arguments or [], out, resume, max_minutes, device, dry_run, trace)
    train("train vae", VaeTraining, build, "tiny/vae", options)


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

    On a GPU: `longvideo train ar tiny/ar_opening --out runs/ar_opening --max-minutes 9`

    On a CPU, in a minute or two: `longvideo train ar cpu/ar --out runs/try_ar`

    On a CPU, on videos: `longvideo train ar cpu/clips data=MANIFEST --out runs/try_clips`
    """
    from longvideo.config.loading import find_config, sets_key

    options = Options(arguments or [], out, resume, max_minutes, device, dry_run, trace)
    if sets_key("data", [find_config(name) for name in options.configs], options.overrides):
        from longvideo.train.clips.recipe import ClipTraining

        def build_clips(config: ClipTraining, target: torch.device, mesh: Mesh) -> Recipe:
            from longvideo.train.clips.recipe import ClipRecipe

            return ClipRecipe(config, target, mesh, dry_run=bool(dry_run))

        train("train ar", ClipTraining, build_clips, "wan/ar", options)
        return

    def build(config: ArTraining, target: torch.device, mesh: Mesh) -> Recipe:
        from longvideo.train.shapeworld.recipe import ArRecipe

        return ArRecipe(config, target, mesh, dry_run=bool(dry_run))

    from longvideo.train.shapeworld.recipe import ArTraining

    train("train ar", ArTraining, build, "tiny/ar_opening", options)
