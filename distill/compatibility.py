"""Refuse a teacher or an adapter that does not fit the student, before a weight is read."""

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
                    f"{name} of the teacher {teacher.path} is {other[name]!r}; expected {value!r}, as the student"
                    f" {student.path}; their {kind} must be equal"
                )


def check_not_packed(folder: ModelFolder, use: str) -> None:
    """Raise CheckpointError for packed weights. use: what the model is in the distillation."""
    if folder.is_packed:
        raise CheckpointError(
            f"{use} {folder.path} has packed 4-bit weights; expected bf16 weights; use the one that it was packed from"
        )


def check_adapter(adapter: Adapter, lora: LoraSettings, shape: TransformerConfig, model: str, name: str) -> None:
    """Raise CheckpointError unless an adapter has the rank and the layers of `lora` and fits the model.

    model, name: names of the model and of the adapter, for the error.
    """
    if adapter.rank != lora.rank:
        raise CheckpointError(f"lora.rank is {lora.rank}; expected {adapter.rank}, the rank of the adapter {name}")
    with OnMeta():
        sizes = layer_sizes(CausalTransformer(shape))
    adapter.check_fits(sizes, model, name)
    if different := sorted(set(lora.layers(sizes)) ^ set(adapter.layers)):
        raise CheckpointError(
            f"lora.targets is {', '.join(lora.targets)}; expected the layers that the adapter {name} updates; the two"
            f" differ in {different[0]}"
        )
