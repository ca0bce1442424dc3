"""A 4-bit student and its teacher: two networks, loaded from model folders."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from longvideo.distill.backbone import load_frozen
from longvideo.distill.roles import Role, adapter_weights, initialize_adapter
from longvideo.quantization.convert import with_precision
from longvideo.quantization.lora import add_lora
from longvideo.quantization.straight_through import STORED, pack_layers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from longvideo.checkpoint.folder import ModelFolder
    from longvideo.distill.roles import LoraSettings
    from longvideo.model.cache import ChunkCache
    from longvideo.model.config import TransformerConfig
    from longvideo.model.spec import ChunkSpec
    from longvideo.model.transformer import CausalTransformer


class StudentAndTeacher:
    """Roles that are networks of their own.

    trained: trained parameters of the student, by name. caches: class of each network's KV cache.
    """

    def __init__(
        self,
        student: CausalTransformer,
        teacher: CausalTransformer,
        *,
        trained: dict[str, nn.Parameter],
        caches: Mapping[Role, type[ChunkCache]],
        spec: ChunkSpec,
    ) -> None:
        self.device = student.patch_embedding.weight.device
        self.networks = {Role.STUDENT: student, Role.TEACHER: teacher}
        self._trained, self._caches, self._spec = trained, caches, spec

    def switch(self, role: Role) -> CausalTransformer:
        return self.networks[role]

    def trained(self, role: Role) -> dict[str, nn.Parameter]:
        assert role is Role.STUDENT, "the teacher is frozen"
        return self._trained

    def new_cache(self, role: Role, batch: int) -> ChunkCache:
        return self._caches[role](self.networks[role].cache_sizes(self._spec, batch=batch))

    def pack(self) -> None:
        """Round the weights that are trained, as they are now, for the passes that follow."""
        pack_layers(self.networks[Role.STUDENT])


def load_stored(
    folder: ModelFolder | None, shape: TransformerConfig, *, dtype: torch.dtype, device: torch.device, seed: int
) -> CausalTransformer:
    """Load a frozen transformer with the values that a model folder stores in bfloat16, or in packed layers.

    dtype: of the network.
    """
    if folder is not None and folder.is_packed:
        return load_frozen(folder, shape, dtype=dtype, device=device, seed=seed)
    return load_frozen(folder, shape, dtype=STORED, device=device, seed=seed).to(dtype)


def train_adapter(
    student: CausalTransformer, lora: LoraSettings, *, packed: bool, seed: int
) -> dict[str, nn.Parameter]:
    """Pack a student and add an adapter to its layers; return the weights of the adapter by name.

    packed: whether the layers are packed already.
    """
    with_precision(student, "nvfp4", packed=packed)
    add_lora(student, lora.config(), adapter_name=Role.STUDENT.value)
    weights = adapter_weights(student, Role.STUDENT)
    initialize_adapter(weights, torch.Generator().manual_seed(seed), student.patch_embedding.weight.device)
    return weights
