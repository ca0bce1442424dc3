"""`longvideo quantize`: pack a model's transformer into 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longvideo.cli.progress import bytes_progress
from longvideo.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from longvideo.kernels.nvfp4.format import NVFP4Tensor

RULES = ("adaptive", "static6", "static4", "adaptive-abs", "adaptive-max")


def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="`tiny`, a model folder, or a Hugging Face id.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    rule: Annotated[str, typer.Option(help=f"How a group's scale is found: {', '.join(RULES)}.")] = "adaptive",
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Layers that stay as they are, by official name; `*` stands for anything. May be repeated."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if it exists.")] = False,
) -> None:
    """Pack the transformer's weights into NVFP4: 4 bits and an 8-bit scale for every 16 of them.

    All linear layers inside the blocks are packed; embeddings, modulation, head and norms stay as they are, and so do
    the autoencoder and the text encoder. Prints how much smaller the transformer is, and the error of each kind of
    layer. The folder is used like any other: `longvideo generate --model DST`.

    `longvideo quantize tiny tiny-nvfp4`

    `longvideo quantize wan-folder wan-nvfp4 --keep "blocks.0.*" --keep "blocks.29.*"`
    """
    from dataclasses import replace

    from longvideo.checkpoint.conversion import Wishes, convert_model
    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.kernels.nvfp4 import reference
    from longvideo.quantization.linear import CODES

    if rule not in RULES:
        raise UserError(f"--rule {rule!r} is unknown; use one of {', '.join(RULES)}")
    folder = ModelFolder.open(source)
    if folder.is_packed:
        raise UserError(f"{folder.path} is packed already; quantise the folder it was made from")
    errors: dict[str, list[float]] = {}

    def on_packed(layer: str, weight: Tensor, packed: NVFP4Tensor) -> None:
        error = (reference.dequantize(packed) - weight).norm() / weight.float().norm()
        errors.setdefault(layer.split(".", 2)[2], []).append(float(error))

    wishes = Wishes(precision="nvfp4", rule=rule, keep=tuple(keep or ()))
    with bytes_progress("packing") as progress:
        convert_model(folder, destination, wishes, overwrite=overwrite, progress=replace(progress, on_packed=on_packed))
    for kind, values in errors.items():
        print(f"{kind}: relative error {100 * min(values):.1f} to {100 * max(values):.1f} %")
    result = ModelFolder.open(destination)
    before, after = (model.weights("transformer").num_bytes for model in (folder, result))
    num_layers = sum(name.endswith(f".{CODES}") for name in result.weights("transformer").infos)
    if sum(map(len, errors.values())) < num_layers:
        print("layers that an earlier, interrupted command had packed are not among these")
    print(f"{destination}: {num_layers} layers packed, transformer {_size(before)} -> {_size(after)}")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
