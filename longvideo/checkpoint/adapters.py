"""A trained adapter: low-rank weights in memory, which are saved for peft and for diffusers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longvideo.checkpoint import names
from longvideo.checkpoint.adapter_files import (
    DIFFUSERS_PREFIX,
    DOWN,
    PEFT_CONFIG,
    PEFT_PREFIX,
    PEFT_STEM,
    UP,
    open_adapter,
    open_adapter_folder,
)
from longvideo.checkpoint.locations import check_links
from longvideo.checkpoint.saving import save_weights
from longvideo.checkpoint.tensors import InMemory, Weights, as_bytes, read
from longvideo.errors import CheckpointError
from longvideo.files import write_json
from longvideo.quantization.linear import NVFP4Linear

if TYPE_CHECKING:
    from pathlib import Path

    from longvideo.checkpoint.updates import LowRank, StoredAdapter

DIFFUSERS_STEM = "pytorch_lora_weights"
DOWN_NAME, UP_NAME = f".{DOWN}", f".{UP}"
"""Ends of the names of the weights of a trained adapter."""


@dataclass(frozen=True)
class Adapter:
    """Low-rank updates of a transformer's layers.

    weights: `blocks.0.self_attn.q.lora_A` [rank, in] and `.lora_B` [out, rank], under official names. scaling: factor
    of an update B @ A.
    """

    weights: Mapping[str, Tensor]
    rank: int
    scaling: float

    @property
    def layers(self) -> list[str]:
        """Official names of the layers that it updates."""
        return [name.removesuffix(DOWN_NAME) for name in self.weights if name.endswith(DOWN_NAME)]

    def stored(self) -> StoredAdapter:
        """Return the adapter as one that was opened; the digest of its weights takes the place of file names."""
        digest = hashlib.sha256()
        for name in sorted(self.weights):
            for piece in InMemory(self.weights[name]).pieces():
                digest.update(as_bytes(piece))
        tensors = {name: InMemory(tensor) for name, tensor in self.weights.items()}
        return open_adapter(Weights(tensors, metadata={"sha256": digest.hexdigest()}), scale=self.scaling)

    def save(self, folder: Path, *, base: str) -> None:
        """Write a folder that `peft.PeftModel.from_pretrained` reads, with a second file that diffusers reads.

        base: name of the base model. The diffusers file cannot store a scaling, so its weights are multiplied by it.
        """
        peft = {f"{PEFT_PREFIX}{name}.weight": x for name, x in self.weights.items()}
        save_weights(folder, PEFT_STEM, peft, dtype=torch.float32)
        config = {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": base,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.scaling * self.rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted(self.layers),
        }
        write_json(folder / PEFT_CONFIG, config)
        diffusers = {
            _diffusers_name(name): x * self.scaling if name.endswith(UP_NAME) else x for name, x in self.weights.items()
        }
        save_weights(folder, DIFFUSERS_STEM, diffusers, dtype=torch.float32)

    @classmethod
    def load(cls, folder: Path) -> Adapter:
        """Read a folder that `save` or peft wrote. Raises CheckpointError, naming the file, if it is not a LoRA."""
        check_links(folder)
        return cls.of(open_adapter_folder(folder))

    @classmethod
    def of(cls, stored: StoredAdapter) -> Adapter:
        """Read an adapter in float32, with one rank and scaling for all layers.

        Narrower updates are filled with zeros, and scales that differ are multiplied into `lora_B`. Raises
        CheckpointError for NaN or infinity, and for an adapter that changes more than weights by low rank.
        """
        low_rank = stored.finite().low_rank
        for name, updates in stored.updates.items():
            update = low_rank.get(name.removesuffix(".weight"))
            if len(updates) != 1 or update is None or update.magnitude is not None or len(update.shape) != 2:
                raise CheckpointError(
                    f"{stored.label} updates {name} by more than a low-rank product of matrices; merge it into a model"
                    " with `longvideo convert --adapter`"
                )
        rank = max(stored.ranks)
        scaling = stored.scales[0] if len(stored.scales) == 1 else 1.0
        weights: dict[str, Tensor] = {}
        for layer, update in low_rank.items():
            weights[layer + DOWN_NAME], weights[layer + UP_NAME] = _widened(update, rank, scaling)
        return cls(weights, rank, scaling)

    def check_fits(self, sizes: Mapping[str, tuple[int, int]], model: str, adapter: str) -> None:
        """Raise CheckpointError unless every update belongs to a layer of the model and has its size.

        sizes: [out, in] of the layers that an adapter can update. model, adapter: names for the error.
        """
        for layer in self.layers:
            if layer not in sizes:
                raise CheckpointError(
                    f"{adapter} updates {layer}, which is not a layer of {model}; use the model that it was trained on"
                )
            rows, columns = sizes[layer]
            up, down = tuple(self.weights[layer + UP_NAME].shape), tuple(self.weights[layer + DOWN_NAME].shape)
            if (up, down) != ((rows, self.rank), (self.rank, columns)):
                raise CheckpointError(
                    f"{adapter}: the update of {layer} is {list(up)} x {list(down)}, expected"
                    f" {[rows, self.rank]} x {[self.rank, columns]} for {model} at rank {self.rank}"
                )


def layer_sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return [out, in] of the linear layers inside the blocks; the model may be on the meta device."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if name.startswith("blocks.") and isinstance(module, nn.Linear | NVFP4Linear)
    }


def _widened(update: LowRank, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return the two factors of an update at a rank that is at least its own, for another scaling."""
    down, up = read(update.down).float(), read(update.up).float()
    if update.scale != scaling:
        up = up * (update.scale / scaling)
    return F.pad(down, (0, 0, 0, rank - update.rank)), F.pad(up, (0, rank - update.rank))


def _diffusers_name(name: str) -> str:
    layer, _, part = name.rpartition(".")
    return f"{DIFFUSERS_PREFIX}{names.to_diffusers(f'{layer}.weight').removesuffix('.weight')}.{part}.weight"
