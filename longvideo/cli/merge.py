"""`longvideo merge`: add an adapter to the weights of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longvideo.checkpoint.choices import AdapterChoice, adapter_choices
from longvideo.cli.model_options import AdapterNames, ModelChoice
from longvideo.errors import UserError, known


def merge(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="`tiny`, a model folder, or a Hugging Face id.")],
    lora: Annotated[
        str,
        typer.Argument(
            metavar="LORA[:STRENGTH]",
            help="Adapter: `lora/` of a run, or a file or folder of kohya, ComfyUI, diffusers, peft or LongLive.",
        ),
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    steps: Annotated[int, typer.Option(help="Solver steps that the merged model generates with by default.")] = 4,
    clean_pass: Annotated[
        bool | None,
        typer.Option(help="Whether the merged model runs a clean pass after each chunk.  [default: as MODEL]"),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="`bf16` (as MODEL is stored), or `nvfp4` to pack the merged weights to 4 bits.")
    ] = "bf16",
    adapter: AdapterNames = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if it exists.")] = False,
) -> None:
    """Add LoRA adapters to the weights of a model folder: LORA, then each `--adapter`.

    Sums are computed in fp32 and rounded once. A packed MODEL is unpacked first; the folder that it was packed from
    gives better weights. The result generates without guidance.

    `longvideo merge tiny runs/dmd/lora merged`

    `longvideo merge tiny few_steps.safetensors merged --adapter guidance.safetensors:0.5`
    """
    from longvideo.infer.options import SamplingOptions

    packed = known("precision", precision, ("bf16", "nvfp4")) == "nvfp4"
    SamplingOptions(steps)
    if destination.exists() and not overwrite:
        raise UserError(f"{destination} exists; choose another name or add --overwrite")
    from longvideo.distill.merging import save_merged

    choices = (AdapterChoice.parse(lora), *adapter_choices(adapter or []))
    folder = ModelChoice(model, adapters=choices).open()
    save_merged(folder, destination, steps=steps, clean_pass=clean_pass, packed=packed, overwrite=overwrite)
    parameters = {name for one in folder.adapters for name in one.updates}
    added = " and ".join(one.description for one in folder.adapters)
    print(f"{destination}: {model} with {added} added to {len(parameters)} parameters, {steps} steps, no guidance")
