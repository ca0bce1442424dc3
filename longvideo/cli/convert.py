"""`longvideo convert`: a model of any known format into another, in little memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longvideo.cli.model_options import Entry, ModelChoice
from longvideo.cli.progress import bytes_progress
from longvideo.errors import UserError


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="`tiny`, a folder or a file in any format named above, or a Hugging Face id."
        ),
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder or file to write.")],
    target: Annotated[
        str,
        typer.Option(
            "--to", help="`longvideo`, `diffusers`, `official`, `longlive`, `safetensors` or `lora`; see above."
        ),
    ] = "longvideo",
    base: Annotated[
        str | None,
        typer.Option(help="Model from which the parts that SRC lacks come, and which a LoRA is added to."),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="Of the transformer: `bf16`, `fp32` or `nvfp4`.  [default: as it is stored]"),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Settings of the result, `wan2.2-ti2v-5b` or `longlive-2.0-5b`.  [default: those of SRC or --base]"
        ),
    ] = None,
    entry: Entry = None,
    shard_gb: Annotated[float, typer.Option(min=0.001, max=100000, help="Largest .safetensors file, in GB.")] = 5.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if it exists.")] = False,
) -> None:
    """Turn a model into another format, tensor by tensor, so that any machine can do it.

    What SRC is, is seen from its content. Known are Wan's official folder (`Wan2.2-TI2V-5B`), diffusers' and this
    project's folders, LongLive 2.0's checkpoints (`.pt`: whole, packed in 4 bits, or LoRA), checkpoints of this
    project's training runs, LoRA of peft or diffusers, and single .safetensors files of any of these names.

    `--to longvideo`: a folder for every command here; diffusers reads it too, unless it is packed. `diffusers`: the
    same without this project's settings. `official`: the folder that Wan's own code reads. `longlive`: one .pt file
    that LongLive's code reads. `safetensors`: the transformer in one file, under official names. `lora`: SRC's adapter
    for peft and for diffusers.

    Nothing is written if a tensor is missing, unknown or misshapen. A conversion that was cut short goes on where it
    was when the same command is given again; DST appears when it is whole.

    `longvideo convert Wan2.2-TI2V-5B wan`

    `longvideo convert model_bf16.pt longlive --base Wan2.2-TI2V-5B`

    `longvideo convert longlive longlive-nvfp4 --precision nvfp4`
    """
    from longvideo.checkpoint.conversion import Wishes, convert_model

    if target == "lora":
        if precision is not None or preset is not None:
            raise UserError("--to lora writes an adapter as it is; it takes neither --precision nor --preset")
        from longvideo.checkpoint.conversion import convert_adapter

        convert_adapter(source, destination, base=base, entry=entry, overwrite=overwrite)
        print(f"{destination}: for peft and for diffusers")
        return
    wishes = Wishes(target, precision, max_shard_bytes=int(shard_gb * 1e9))
    model = ModelChoice(source, base, preset, entry).open()
    with bytes_progress("writing") as progress:
        convert_model(model, destination, wishes, overwrite=overwrite, progress=progress)
    print(f"{destination}: {model.format} as {target}, {_size(destination)}")
    if model.missing and target == "longvideo":
        print(f"it has no {' and no '.join(model.missing)}; add --base FOLDER to take them from there")


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    num_bytes = sum(file.stat().st_size for file in files)
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
