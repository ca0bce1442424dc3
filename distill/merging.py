"""Write a model with its adapters added to the weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from longvideo.checkpoint.conversion import ConversionOptions, convert_model

if TYPE_CHECKING:
    from pathlib import Path

    from longvideo.checkpoint.folder import ModelFolder


def save_merged(
    source: ModelFolder,
    target: Path,
    *,
    steps: int,
    clean_pass: bool | None = None,
    packed: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a model folder whose transformer has the sum of weights and adapters, and generates without guidance.

    steps: default solver steps of the folder. clean_pass: see `ModelSettings`; by default the source's. packed: whether
    the merged weights are packed to 4 bits.
    """
    settings = replace(source.settings, steps=steps, guidance=1.0)
    if clean_pass is not None:
        settings = replace(settings, clean_pass=clean_pass)
    options = ConversionOptions(precision="nvfp4" if packed else None)
    convert_model(replace(source, settings=settings), target, options, overwrite=overwrite)
