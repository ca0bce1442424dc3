"""`longvideo train`: the autoencoder, the transformer on ShapeWorld or on videos of one's own, and a small decoder."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from longvideo.cli.training import train, training_command
from longvideo.errors import ConfigError
from longvideo.machine.launcher import is_main_process

if TYPE_CHECKING:
    import torch

    from longvideo.distributed import Mesh
    from longvideo.training.options import RunOptions

app = typer.Typer(
    no_args_is_help=True, help="Train models: the autoencoder first, then the transformer, then a small decoder."
)


def vae(options: RunOptions) -> None:
    """Train the video autoencoder on ShapeWorld.

    The run folder holds `config.yaml`, `environment.json`, `metrics.jsonl`, `checkpoints/`, `samples/` (given and
    reconstructed clips) and `model/` (the averaged weights in diffusers' layout, with latent statistics).

    On a GPU: `longvideo train vae tiny/vae --output runs/vae --max-minutes 9`

    On a CPU, in a minute or two: `longvideo train vae cpu/vae --output runs/try_vae`

    Presets: `tiny/vae` (the default), `tiny/vae_refine`, `cpu/vae`.

    Keys most used: `stages[0].steps`, `optimizer.learning_rate`, `model.base_dim`, `initialize`, `seed`,
    `trainer.save_every`. `longvideo config keys train vae` explains all.
    """
    from longvideo.train.vae.recipe import VaeRecipe, VaeTraining

    def build(config: VaeTraining, device: torch.device, mesh: Mesh) -> VaeRecipe:
        if mesh.world > 1:
            raise ConfigError(f"the autoencoder is trained in one process, but {mesh.world} were started; start one")
        return VaeRecipe(config, device)

    train(options, VaeTraining, build, default_config="tiny/vae")


def ar(options: RunOptions) -> None:
    """Train the causal transformer and its text encoder on ShapeWorld, by teacher forcing.

    The autoencoder comes from a model folder, `vae=runs/vae/model` or `vae=tiny`; `initialize=` names a model folder to
    take the transformer and the text encoder from. The preset `tiny/ar_opening` trains how videos begin, `tiny/ar`
    continues from it with how they go forward.

    The run folder has the files of `train vae`. Its `model/` is complete: `longvideo generate --model RUN/model`.

    On a GPU: `longvideo train ar tiny/ar_opening --output runs/ar_opening --max-minutes 9`

    On a CPU, in a minute or two: `longvideo train ar cpu/ar --output runs/try_ar`

    On several GPUs: `torchrun --nproc-per-node 8 -m longvideo train ar tiny/ar_opening --output runs/ar_opening`

    Presets: `tiny/ar_opening` (the default), `tiny/ar`, `tiny/recolor`, `cpu/ar`.

    Keys most used: `stages[0].steps`, `optimizer.learning_rate`, `vae`, `initialize`, `model.num_layers`, `seed`,
    `trainer.save_every`, `rollout.prompts`. `longvideo config keys train ar` explains all.
    """
    from longvideo.config.loading import find_config, sets_key

    if sets_key("data", [find_config(name) for name in options.configs], options.overrides):
        if is_main_process():
            print("note: `longvideo train ar` with `data` runs `longvideo train clips`; use that", file=sys.stderr)
        clips(options)
        return
    from longvideo.train.shapeworld.recipe import ArRecipe, ArTraining

    def build(config: ArTraining, device: torch.device, mesh: Mesh) -> ArRecipe:
        return ArRecipe(config, device, mesh, dry_run=options.dry_run > 0)

    train(options, ArTraining, build, default_config="tiny/ar_opening")


def clips(options: RunOptions) -> None:
    """Train the causal transformer on your own videos, by teacher forcing.

    `data` names a folder that `longvideo data encode` made, or a manifest of videos, which are then encoded again in
    every epoch. `initialize` names the model folder that everything else comes from. With `--dry-run`, neither is
    needed.

    The run folder has the files of `train vae`. Its `model/` is complete if `initialize` is complete.

    On GPUs: `torchrun --nproc-per-node 8 -m longvideo train clips wan/ar data=clips initialize=wan parallel.sequence=4`

    On a CPU, in a minute or two: `longvideo train clips cpu/clips data=MANIFEST --output runs/try_clips`

    Presets: `wan/ar` (the default), `wan/ar_nvfp4`, `wan/ar_64s`, `cpu/clips`.

    Keys most used: `data`, `initialize`, `stages[0].chunks`, `stages[0].batch`, `stages[0].steps`,
    `optimizer.learning_rate`, `parallel.sequence`, `parallel.zero_stage`, `products.format`, `trainer.save_every`.
    `longvideo config keys train clips` explains all.
    """
    from longvideo.train.clips.config import ClipTraining
    from longvideo.train.clips.recipe import ClipRecipe

    def build(config: ClipTraining, device: torch.device, mesh: Mesh) -> ClipRecipe:
        return ClipRecipe(config, device, mesh, dry_run=options.dry_run > 0)

    train(options, ClipTraining, build, default_config="wan/ar")


def decoder(options: RunOptions) -> None:
    """Train a small decoder that makes the pixels of a model's full decoder at a small part of its cost.

    `model` names the model folder whose autoencoder is imitated, by default `tiny`. The clips are those of ShapeWorld,
    rendered on the device, or with `data` those of a folder that `longvideo data encode` made with this model.

    The run folder has the files of `train vae`. `samples/` shows both decoders and their difference, a table compares
    them by objects, outlines and background, and `model/decoder.safetensors` is the decoder:
    `longvideo generate ... --decoder RUN/model/decoder.safetensors`.

    On a GPU: `longvideo train decoder tiny/decoder --output runs/decoder`

    On a CPU, in a minute or two: `longvideo train decoder cpu/decoder --output runs/try_decoder`

    Presets: `tiny/decoder` (the default), `cpu/decoder`.

    Keys most used: `model`, `data`, `widths`, `stages[0].steps`, `optimizer.learning_rate`, `bank.clips`,
    `bank.noise`, `initialize`, `seed`. `longvideo config keys train decoder` explains all.
    """
    from longvideo.train.decoder.recipe import DecoderRecipe, DecoderTraining

    def build(config: DecoderTraining, device: torch.device, _mesh: Mesh) -> DecoderRecipe:
        return DecoderRecipe(config, device, dry_run=options.dry_run > 0)

    train(options, DecoderTraining, build, default_config="tiny/decoder")


for run, folder in ((vae, "runs/vae"), (ar, "runs/ar"), (clips, "runs/clips"), (decoder, "runs/decoder")):
    command = training_command(run, command=f"train {run.__name__}", folder=folder)
    app.command(run.__name__, no_args_is_help=False)(command)
