"""Check that a model fits into memory before it is loaded again, with other adapters, while its other parts stay."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from longvideo.infer.fit.memory import Workload, loaded_bytes
from longvideo.infer.fit.refusal import check_memory
from longvideo.infer.fit.resident import resident_bytes
from longvideo.infer.fit.shapes import folder_shapes
from longvideo.text.known_prompts import KnownPrompts

if TYPE_CHECKING:
    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.infer.generation import Models


def check_reloading(models: Models, folder: ModelFolder) -> None:
    """Raise UserError where a GPU has too little memory for loaded models with the transformer of another folder.

    The memory of their weights counts as free; that of their stages does not. models: those of a folder.
    """
    assert models.folder is not None
    former = _workload(models, models.folder)
    own = Counter(loaded_bytes(former))
    own.subtract(former.resident)  # the owner of these weights keeps them
    check_memory(replace(_workload(models, folder), loaded=own))


def _workload(models: Models, folder: ModelFolder) -> Workload:
    """Return the workload of loaded models with the transformer of a folder."""
    shapes = folder_shapes(folder, models.stored_decoder)
    if isinstance(models.text_encoder, KnownPrompts):
        shapes = replace(shapes, text_encoder=None)  # it is freed, and is not loaded again
    resident = resident_bytes(folder, models.placement, models.formats)
    return Workload(shapes=shapes, formats=models.formats, placement=models.placement, resident=resident)
