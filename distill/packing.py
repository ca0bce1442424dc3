"""Write a student of quantization-aware distillation as a model folder."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from longvideo.checkpoint.conversion import ConversionOptions, convert_model
from longvideo.checkpoint.packed import is_of_packed_layer
from longvideo.checkpoint.parts import TRANSFORMER
from longvideo.checkpoint.tensors import InMemory
from longvideo.files import write_json
from longvideo.quantization.straight_through import STORED

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from longvideo.checkpoint.choices import StoredPrecision
    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.checkpoint.settings import ModelSettings

RECORD_FILE = "distillation.json"


def with_trained(source: ModelFolder, weights: Mapping[str, Tensor]) -> ModelFolder:
    """Return a model in bfloat16 with other values of some weights of its transformer.

    weights: by official name. Packed layers stay as they are.
    """
    part = source.stored[TRANSFORMER]
    trained = {name: InMemory(weight.detach().cpu()) for name, weight in weights.items()}
    changed = part.weights.replaced(trained).cast(STORED, keep=is_of_packed_layer)
    return replace(source, stored={**source.stored, TRANSFORMER: part.with_weights(changed)})


def save_student(
    source: ModelFolder,
    target: Path,
    *,
    settings: ModelSettings,
    precision: StoredPrecision,
    record: Mapping[str, Any],
) -> None:
    """Write a model folder, in place of one that exists.

    source: the student. settings: those that it generates with. precision: "nvfp4" packs as `longvideo quantize` does.
    record: facts about its training, written to `distillation.json` next to its settings.
    """
    convert_model(replace(source, settings=settings), target, ConversionOptions(precision=precision), overwrite=True)
    write_json(target / RECORD_FILE, dict(record), indent=1)
