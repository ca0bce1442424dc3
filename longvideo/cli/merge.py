"""`longvideo merge`: add an adapter to the weights of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longvideo.errors import UserError, known


def merge(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="`tiny`, a model folder, or a Hugging Face id.")],
    adapter: Annotated[Path, typer.Argument(metavar="LORA", help="Adapter folder: `lora/` of a run, or peft's own.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    steps: Annotated[int, typer.Option(help="Solver steps that the merged model generates with by default.")] = 4,
    clean_pass: Annotated[
        bool | None,
        typer.Option(help="Whether the merged model runs a clean pass after each chunk.  [default: as MODEL]"),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="`bf16` (as MODEL is stored), or `nvfp4` to pack the merged weights to 4 bits.")
    ] = "bf16",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if it exists.")] = False,
) -> None:
    """Add a LoRA adapter to the weights of a model folder.

    Sums are computed in fp32 and rounded once. A packed MODEL is unpacked first; the folder that it was packed from
    gives better weights. The result generates without guidance.

    `longvideo merge tiny runs/dmd/lora merged`
    """
    from longvideo.infer.options import SamplingOptions

    packed = known("precision", precision, ("bf16", "nvfp4")) == "nvfp4"
    SamplingOptions(steps)
    if destination.exists() and not overwrite:
        raise UserError(f"{destination} exists; choose another name or add --overwrite")
    from longvideo.checkpoint.adapters import Adapter, layer_sizes
    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.checkpoint.modules import OnMeta
    from longvideo.distill.merging import save_merged
    from longvideo.model.transformer import CausalTransformer

    folder, lora = ModelFolder.open(model), Adapter.load(adapter)
    with OnMeta():
        sizes = layer_sizes(CausalTransformer(folder.transformer_config))
    lora.check_fits(sizes, model, str(adapter))
    save_merged(folder, lora, destination, steps=steps, clean_pass=clean_pass, packed=packed, overwrite=overwrite)
    print(f"{destination}: {model} with {adapter} added to {len(lora.layers)} layers, {steps} steps, no guidance")
