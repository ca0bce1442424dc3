"""`longvideo merge`: add an adapter to the weights of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longvideo.errors import UserError


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
