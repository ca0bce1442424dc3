"""`longvideo convert`: convert a model of any known format to another, in little memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from longvideo.checkpoint.choices import StoredPrecision, TargetName, adapter_choices
from longvideo.cli.model_options import AdapterNames, Entry, ModelChoice
from longvideo.cli.printing import shown_size
from longvideo.cli.progress import bytes_progress
from longvideo.errors import UserError, known


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="`tiny`, a folder or file in one of the formats above, or a Hugging Face id."
        ),
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder or file to write.")],
    target: Annotated[
        Literal[TargetName, "lora"], typer.Option("--to", help="Format of the result; see above.")
    ] = "longvideo",
    base: Annotated[
        str | None,
        typer.Option(help="Model that provides the parts missing from SRC, and to which a LoRA is added."),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Precision of the transformer: `bf16`, `fp32`, `nvfp4`, or `fp8` with `--to modelopt`.  [default: as"
            " stored]"
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Settings of the result, `wan2.2-ti2v-5b` or `longlive-2.0-5b`.  [default: those of SRC or --base]"
        ),
    ] = None,
    entry: Entry = None,
    adapter: AdapterNames = None,
    shard_gb: Annotated[float, typer.Option(min=0.001, max=100000, help="Largest .safetensors file, in GB.")] = 5.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if it exists.")] = False,
) -> None:
    """Convert a model to another format, tensor by tensor, in little memory.

    The format of SRC is recognized by its content. It can be Wan's official folder (`Wan2.2-TI2V-5B`), a folder of
    diffusers or of this project, a checkpoint of LongLive 2.0 (`.pt`: full, packed in 4 bits, or LoRA), a checkpoint of
    a training run of this project, a LoRA of kohya, ComfyUI, diffusers or peft, a GGUF file, an export of NVIDIA
    ModelOpt, or a single file in one of these namings, in FP8 too and with the prefixes of ComfyUI or DiffSynth.

    `--to longvideo`: a folder for all commands of longvideo, which diffusers also reads unless it is packed.
    `diffusers`: the same without this project's settings. `official`: a folder for Wan's own code. `longlive`: one .pt
    file for LongLive's code. `safetensors`: the transformer in one file, under official names. `modelopt`: a folder of
    diffusers with weights in 4 or 8 bits in the layout of NVIDIA ModelOpt. `lora`: the adapter in SRC, for peft and for
    diffusers.

    Nothing is written if a tensor is missing, unknown or has a wrong shape. An interrupted conversion continues when
    the same command is run again. DST appears when it is complete.

    `longvideo convert Wan2.2-TI2V-5B wan`

    `longvideo convert model_bf16.pt longlive --base Wan2.2-TI2V-5B`

    `longvideo convert longlive longlive-nvfp4 --precision nvfp4`
    """
    from longvideo.checkpoint.conversion import ConversionOptions, convert_model
    from longvideo.machine.host import bytes_on_disk

    if target == "lora":
        if precision is not None or preset is not None or adapter:
            raise UserError("--to lora does not support --precision, --preset and --adapter; leave them out")
        from longvideo.checkpoint.conversion import convert_adapter

        convert_adapter(source, destination, base=base, entry=entry, overwrite=overwrite)
        print(f"{destination}: LoRA for peft and for diffusers")
        return
    stored = None if precision is None else known("precision", precision, get_args(StoredPrecision))
    options = ConversionOptions(target, stored, max_shard_bytes=int(shard_gb * 1e9))
    model = ModelChoice(source, base, preset, entry, adapters=adapter_choices(adapter or [])).open()
    with bytes_progress("writing") as progress:
        convert_model(model, destination, options, overwrite=overwrite, progress=progress)
    print(f"{destination}: {model.format} as {target}, {shown_size(bytes_on_disk(destination))}")
    if model.missing and target == "longvideo":
        print(f"it has no {' and no '.join(model.missing)}; use --base with a model that has them")
