"""`longvideo distill`, the same under `torchrun -m longvideo.distill`, and `longvideo merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longvideo.errors import UserError
from longvideo.packages import require
from longvideo.training.command import Arguments, Device, DryRun, MaxMinutes, Options, Out, Resume, Trace, train

if TYPE_CHECKING:
    import torch

    from longvideo.distill.config import Distillation
    from longvideo.distill.distillation import DistillRecipe
    from longvideo.distill.engine import PairedEngine
    from longvideo.training.mesh import Mesh
    from longvideo.training.trainer import Recipe


def distill(
    arguments: Arguments = None,
    out: Out = Path("runs/distill"),
    resume: Resume = "auto",
    max_minutes: MaxMinutes = None,
    device: Device = None,
    dry_run: DryRun = 0,
    trace: Trace = False,
) -> None:
    """Distil a causal model into one of 4 or 2 steps without guidance (DMD), training LoRA weights alone.

    Student and critic are adapters on one frozen backbone, packed to 4 bits unless `backbone.precision=bf16`; without
    an adapter it is the teacher. The student makes videos as it will when it generates, chunk by chunk on its own
    chunks; teacher and critic compare them.

    Prompts are ShapeWorld's, or `prompts=FILE` (one a line; `.jsonl` with a list of shots a line), or the captions of
    `data=CLIPS`, a folder that `longvideo data encode` made, whose first frames can be given too.

    The run folder is laid out as that of `longvideo train ar`: `lora/` holds the student's adapter in peft's and in
    diffusers' naming, `model/` whole weights.

    On a GPU: `longvideo distill tiny/dmd --out runs/dmd`

    On a CPU, in a minute or two: `longvideo distill cpu/dmd --out runs/try_dmd`

    `torchrun --nproc-per-node 8 -m longvideo.distill wan/dmd model=CAUSAL_5B prompts=prompts.txt --out runs/dmd`
    """

    def build(config: Distillation, target: torch.device, mesh: Mesh) -> Recipe:
        from longvideo.distill.distillation import DistillRecipe

        return DistillRecipe(config, target, mesh, dry_run=bool(dry_run))

    def build_engine(config: Distillation, recipe: DistillRecipe, mesh: Mesh, target: torch.device) -> PairedEngine:
        return recipe.engine(mesh)

    require("peft", extra="train", purpose="longvideo distill")
    from longvideo.distill.config import Distillation

    options = Options(arguments or [], out, resume, max_minutes, device, dry_run, trace)
    train("distill", Distillation, build, "tiny/dmd", options, build_engine=build_engine)


def merge(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="`tiny`, a model folder, or a Hugging Face id.")],
    adapter: Annotated[Path, typer.Argument(metavar="LORA", help="Adapter folder: `lora/` of a run, or peft's own.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    steps: Annotated[int, typer.Option(help="Solver steps that the merged model generates with by default.")] = 4,
    clean_pass: Annotated[
        bool | None,
        typer.Option(help="Whether it runs a clean pass after each chunk, as it was trained to; default: as MODEL."),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="`bf16` (as MODEL is stored), or `nvfp4` to pack the merged weights to 4 bits.")
    ] = "bf16",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if it exists.")] = False,
) -> None:
    """Add a LoRA adapter to the weights of a model folder.

    Sums are made in fp32 and rounded once. A packed MODEL is unpacked for it; better give the folder it was packed
    from. The result generates without guidance.

    `longvideo merge tiny runs/dmd/lora merged`
    """
    if precision not in ("bf16", "nvfp4"):
        raise UserError(f"--precision {precision} is unknown; use bf16 or nvfp4")
    if steps < 1:
        raise UserError(f"--steps {steps} must be at least 1")
    if destination.exists() and not overwrite:
        raise UserError(f"{destination} exists; choose another place or add --overwrite")
    from longvideo.checkpoint.adapters import Adapter, layer_sizes
    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.checkpoint.modules import OnMeta
    from longvideo.distill.merging import save_merged
    from longvideo.model.transformer import CausalTransformer

    folder, found = ModelFolder.open(model), Adapter.load(adapter)
    with OnMeta():
        sizes = layer_sizes(CausalTransformer(folder.transformer_config))
    found.check_fits(sizes, model, str(adapter))
    save_merged(
        folder, found, destination, steps=steps, clean_pass=clean_pass, packed=precision == "nvfp4", overwrite=overwrite
    )
    print(f"{destination}: {len(found.layers)} layers of {model} with {adapter} in them, {steps} steps, no guidance")
