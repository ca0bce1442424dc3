"""Options and checks that the commands of `longvideo bench` share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from longvideo.cli.output import OUTPUT
from longvideo.files import check_target

if TYPE_CHECKING:
    import torch

    from longvideo.infer.fit.shapes import ModelShapes

Preset: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Shapes of a model with random weights: `wan2.2-ti2v-5b` or `tiny`.  [default: wan2.2-ti2v-5b on a GPU,"
        " else tiny]"
    ),
]
Output: TypeAlias = Annotated[Path | None, typer.Option(*OUTPUT, help="Also write the results to this file, as JSON.")]


def preset_name(preset: str | None, device: torch.device) -> str:
    """Return the name of a preset; None chooses the one that suits the device."""
    return preset or ("wan2.2-ti2v-5b" if device.type == "cuda" else "tiny")


def named_shapes(preset: str | None, device: torch.device) -> tuple[str, ModelShapes]:
    """Return the name and the shapes of a preset; None chooses as `preset_name` does."""
    from longvideo.infer.fit.shapes import preset_shapes

    name = preset_name(preset, device)
    return name, preset_shapes(name)


def check_outputs(*files: Path | None) -> None:
    """Raise UserError for a file that cannot be written, before anything is measured. files: None is skipped."""
    for file in files:
        if file is not None:
            check_target(file)


def print_backends(device: torch.device) -> None:
    """Print which kernels and products are timed."""
    from longvideo.kernels.backends import kernels_on, product_backend

    products = product_backend("nvfp4", device)
    typer.echo(f"running on {device} | kernels: {kernels_on(device)} | products nvfp4: {products}", err=True)
