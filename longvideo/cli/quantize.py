"""`longvideo quantize`: pack a model's transformer to 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from longvideo.cli.printing import shown_size
from longvideo.cli.progress import bytes_progress
from longvideo.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from longvideo.kernels.nvfp4.format import NVFP4Tensor

RuleName = Literal["adaptive", "static6", "static4", "adaptive-abs", "adaptive-max"]
"""A name of `Rule`, which is defined where torch is imported."""


def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="`tiny`, a model folder, or a Hugging Face id.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    rule: Annotated[RuleName, typer.Option(help="Rule for the scale of a group of 16 weights.")] = "adaptive",
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Official names of layers that are not packed; `*` matches any text. Can be repeated."),
    ] = None,
    keep_file: Annotated[
        Path | None,
        typer.Option(
            help="File with one such name in each line, as `longvideo eval sensitivity` writes it; added to --keep."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if it exists.")] = False,
) -> None:
    """Pack the transformer's weights to NVFP4: 4 bits for each weight and an 8-bit scale for each group of 16.

    All linear layers of the blocks are packed. Embeddings, modulation, head and norms are not changed, nor are the
    autoencoder and the text encoder. Prints the size of the transformer before and after, and the error of each kind of
    layer. DST is used like any other model: `longvideo generate --model DST`.

    `longvideo quantize tiny tiny-nvfp4`

    `longvideo quantize wan-folder wan-nvfp4 --keep "blocks.0.*" --keep "blocks.29.*"`
    """
    from dataclasses import replace

    from longvideo.checkpoint.conversion import ConversionOptions, convert_model
    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.kernels.nvfp4 import reference
    from longvideo.kernels.nvfp4.format import Rule
    from longvideo.quantization.linear import CODES
    from longvideo.quantization.selection import read_keep_file

    names = [*(keep or ()), *(() if keep_file is None else read_keep_file(keep_file))]
    folder = ModelFolder.open(source)
    if folder.is_packed:
        raise UserError(f"{folder.path} has packed 4-bit weights; quantize the model that they were made from")
    errors: dict[str, list[float]] = {}

    def on_packed(layer: str, weight: Tensor, packed: NVFP4Tensor) -> None:
        error = (reference.dequantize(packed) - weight).norm() / weight.float().norm()
        errors.setdefault(layer.split(".", 2)[2], []).append(float(error))

    options = ConversionOptions(precision="nvfp4", rule=Rule(rule), keep=tuple(names))
    with bytes_progress("packing") as progress:
        convert_model(
            folder, destination, options, overwrite=overwrite, progress=replace(progress, on_packed=on_packed)
        )
    for kind, values in errors.items():
        print(f"{kind}: relative error {100 * min(values):.1f} to {100 * max(values):.1f} %")
    result = ModelFolder.open(destination)
    before, after = (model.weights("transformer").num_bytes for model in (folder, result))
    num_layers = sum(name.endswith(f".{CODES}") for name in result.weights("transformer").infos)
    if sum(map(len, errors.values())) < num_layers:
        print("these do not include the layers that an earlier, interrupted command has packed")
    print(f"{destination}: {num_layers} layers packed, transformer {shown_size(before)} -> {shown_size(after)}")
