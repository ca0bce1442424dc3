"""Add an adapter to the weights of a model folder."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from longvideo.checkpoint.conversion import ConversionOptions, convert_model

if TYPE_CHECKING:
    from pathlib import Path

    from longvideo.checkpoint.adapters import Adapter
    from longvideo.checkpoint.folder import ModelFolder


def save_merged(
    source: ModelFolder,
    adapter: Adapter,
    target: Path,
    *,
    steps: int,
    clean_pass: bool | None = None,
    packed: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a model folder with the adapter added to the transformer's weights, which generates without guidance.

    steps: default solver steps of the folder. clean_pass: see `ModelSettings`; by default the source's. packed: whether
    the merged weights are packed to 4 bits.
    """
    settings = replace(source.settings, steps=steps, guidance=1.0)
    if clean_pass is not None:
        settings = replace(settings, clean_pass=clean_pass)
    options = ConversionOptions(precision="nvfp4" if packed else None)
    convert_model(source.with_adapter(adapter.stored(), settings), target, options, overwrite=overwrite)
