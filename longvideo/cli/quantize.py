"""`longvideo quantize`: pack a model's transformer into 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longvideo.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from torch import nn

    from longvideo.quantization.linear import NVFP4Linear

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
    from rich.console import Console

    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.kernels.nvfp4 import reference
    from longvideo.kernels.nvfp4.format import Rule
    from longvideo.quantization.convert import layers_to_quantize, quantize_layers

    if rule not in RULES:
        raise UserError(f"--rule {rule!r} is unknown; use one of {', '.join(RULES)}")
    folder = ModelFolder.open(source)
    if folder.is_packed:
        raise UserError(f"{folder.path} is packed already; quantise the folder it was made from")
    if destination.exists() and not overwrite:
        raise UserError(f"{destination} exists; choose another place or add --overwrite")
    console = Console(stderr=True)
    transformer = folder.load_transformer()
    num_layers = len(layers_to_quantize(transformer, keep or ()))
    errors: dict[str, list[float]] = {}
    before = _num_bytes(transformer)
    with _progress(console) as progress:
        bar = progress.add_task("layers packed", total=num_layers)

        def on_layer(name: str, old: nn.Linear, new: NVFP4Linear) -> None:
            weight = old.weight.detach().float()
            error = (reference.dequantize(new.quantized_weight) - weight).norm() / weight.norm()
            errors.setdefault(name.split(".", 2)[2], []).append(float(error))
            progress.advance(bar)

        try:
            quantize_layers(transformer, Rule(rule), keep=keep or (), on_layer=on_layer)
        except ValueError as error:
            raise UserError(f"{folder.path}: {error}") from error
    ModelFolder.save(
        destination,
        settings=folder.settings,
        transformer=transformer,
        vae=folder.load_vae() if "vae" in folder.parts else None,
        text_encoder=folder.load_text_encoder() if "text_encoder" in folder.parts else None,
        overwrite=overwrite,
    )
    after = _num_bytes(transformer)
    for kind, values in errors.items():
        print(f"{kind}: relative error {100 * min(values):.1f} to {100 * max(values):.1f} %")
    print(f"{destination}: {num_layers} layers packed, transformer {_size(before)} -> {_size(after)}")


def _num_bytes(module: nn.Module) -> int:
    tensors = (*module.parameters(), *module.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _progress(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)
