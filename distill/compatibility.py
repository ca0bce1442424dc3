"""Refuse a teacher or an adapter that is not of the student's kind, before a weight is read."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from longvideo.checkpoint.adapters import Adapter, layer_sizes
from longvideo.checkpoint.modules import OnMeta
from longvideo.errors import CheckpointError
from longvideo.model.transformer import CausalTransformer

if TYPE_CHECKING:
    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.distill.roles import LoraSettings
    from longvideo.model.config import TransformerConfig


def check_same_shape(student: ModelFolder, teacher: ModelFolder) -> None:
    """Raise CheckpointError unless a teacher has the student's shapes and chunks."""
    for kind, own, other in (
        ("transformer", asdict(student.transformer_config), asdict(teacher.transformer_config)),
        ("chunks", asdict(student.spec), asdict(teacher.spec)),
        ("texts", {"cut_prefix": student.settings.cut_prefix}, {"cut_prefix": teacher.settings.cut_prefix}),
    ):
        for name, value in own.items():
            if other[name] != value:
                raise CheckpointError(
                    f"the student {student.path} has {name}={value!r}, the teacher {teacher.path}"
                    f" {name}={other[name]!r}; their {kind} must be equal"
                )


def check_adapter(adapter: Adapter, lora: LoraSettings, shape: TransformerConfig, model: str, name: str) -> None:
    """Raise CheckpointError unless an adapter has the rank that is to be trained, and is of the model."""
    if adapter.rank != lora.rank:
        raise CheckpointError(
            f"the adapter {name} has rank {adapter.rank}, lora.rank is {lora.rank}; they must be equal"
        )
    with OnMeta():
        sizes = layer_sizes(CausalTransformer(shape))
    adapter.check_fits(sizes, model, name)
