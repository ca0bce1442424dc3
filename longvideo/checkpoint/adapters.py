"""LoRA weights on disk, in the naming of peft, diffusers or LongLive, and their sum with the base weights."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longvideo.checkpoint import names
from longvideo.checkpoint.locations import check_links
from longvideo.checkpoint.opening import open_weights
from longvideo.checkpoint.packed import PACKED_LEAVES
from longvideo.checkpoint.saving import save_weights
from longvideo.checkpoint.tensors import (
    Computed,
    InMemory,
    Lazy,
    TensorInfo,
    Weights,
    as_bytes,
    is_one_byte_float,
    read,
)
from longvideo.errors import CheckpointError
from longvideo.files import read_json, write_json
from longvideo.kernels.nvfp4 import reference
from longvideo.kernels.nvfp4.format import NVFP4Tensor
from longvideo.quantization.linear import CODES, NVFP4Linear

if TYPE_CHECKING:
    from pathlib import Path

PEFT_STEM, PEFT_CONFIG, PEFT_PREFIX = "adapter_model", "adapter_config.json", "base_model.model."
DIFFUSERS_STEM, DIFFUSERS_PREFIX = "pytorch_lora_weights", "transformer."
DOWN, UP = ".lora_A", ".lora_B"
ADAPTER_NAME = ".default"
DIFFUSERS_METADATA = "lora_adapter_metadata"
# fields of peft's configuration that change how an update is applied
UNSUPPORTED = ("use_dora", "fan_in_fan_out", "alpha_pattern", "rank_pattern", "lora_bias")
MAX_ALPHA = 1e9
PREFIXES = (PEFT_PREFIX, DIFFUSERS_PREFIX, names.MODEL_PREFIX)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter of which only file headers are read. The fields are those of `Adapter`."""

    weights: Weights
    rank: int
    scaling: float

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Sizes [out, in] of the layers that it updates."""
        infos = self.weights.infos
        layers = [name.removesuffix(DOWN) for name in infos if name.endswith(DOWN)]
        return {layer: (infos[layer + UP].shape[0], infos[layer + DOWN].shape[1]) for layer in layers}

    def load(self) -> Adapter:
        """Read the weights in float32. Raises CheckpointError for NaN or infinity."""
        weights = self.weights.finite()
        return Adapter({name: weights.read(name).float() for name in weights.infos}, self.rank, self.scaling)


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
        return [name.removesuffix(DOWN) for name in self.weights if name.endswith(DOWN)]

    def stored(self) -> StoredAdapter:
        """Return the adapter as `StoredAdapter`; the digest of its weights takes the place of file names."""
        digest = hashlib.sha256()
        for name in sorted(self.weights):
            for piece in InMemory(self.weights[name]).pieces():
                digest.update(as_bytes(piece))
        tensors = {name: InMemory(tensor) for name, tensor in self.weights.items()}
        return StoredAdapter(Weights(tensors, metadata={"sha256": digest.hexdigest()}), self.rank, self.scaling)

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
            _diffusers_name(name): x * self.scaling if name.endswith(UP) else x for name, x in self.weights.items()
        }
        save_weights(folder, DIFFUSERS_STEM, diffusers, dtype=torch.float32)

    @classmethod
    def load(cls, folder: Path) -> Adapter:
        """Read a folder that `save` or peft wrote. Raises CheckpointError, naming the file, if it is not a LoRA."""
        check_links(folder)
        return open_adapter_folder(folder).load()

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
            up, down = tuple(self.weights[layer + UP].shape), tuple(self.weights[layer + DOWN].shape)
            if (up, down) != ((rows, self.rank), (self.rank, columns)):
                raise CheckpointError(
                    f"{adapter}: the update of {layer} is {list(up)} x {list(down)}, expected"
                    f" {[rows, self.rank]} x {[self.rank, columns]} for {model} at rank {self.rank}"
                )


def open_adapter_folder(folder: Path) -> StoredAdapter:
    """Open a folder that `Adapter.save` or peft wrote. Raises CheckpointError, naming the file, if it is not a LoRA."""
    config = read_json(folder / PEFT_CONFIG)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{folder / PEFT_CONFIG} has peft_type={config.get('peft_type')!r}; expected LORA, with r and lora_alpha"
        )
    return _configured(open_weights(folder, stem=PEFT_STEM), config, str(folder / PEFT_CONFIG))


def open_adapter(weights: Weights) -> StoredAdapter:
    """Open low-rank weights in any of the known namings.

    The scaling is the one that diffusers writes into the header, and otherwise 1, as in LongLive's files
    (alpha = rank). Raises CheckpointError with the tensor's name if it is not a low-rank weight, if its counterpart is
    missing, and if ranks differ.
    """
    if (text := weights.metadata.get(DIFFUSERS_METADATA)) is None:
        return _paired(weights, scaling=1.0)
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{weights.label}: {DIFFUSERS_METADATA} in its header is not JSON") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{weights.label}: {DIFFUSERS_METADATA} in its header is not a JSON object")
    bare = {str(key).removeprefix(DIFFUSERS_PREFIX): value for key, value in config.items()}
    return _configured(weights, bare, weights.label)


def _configured(weights: Weights, config: Mapping[str, Any], label: str) -> StoredAdapter:
    """Open weights with a configuration of peft, whose fields define the scaling."""
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise CheckpointError(f"{label} has r={rank!r}; expected a whole number of at least 1")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < MAX_ALPHA:
        raise CheckpointError(f"{label} has lora_alpha={alpha!r}; expected a number")
    for key in UNSUPPORTED:
        if config.get(key):
            raise CheckpointError(
                f"{label} has {key}={config[key]!r}, which is not supported; merge it with peft first"
            )
    stored = _paired(weights, scaling=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    if stored.rank != rank:
        raise CheckpointError(f"{label} has r={rank}, but its weights have rank {stored.rank}")
    return stored


def _paired(weights: Weights, *, scaling: float) -> StoredAdapter:
    bare = weights.renamed(_bare_name)
    ranks = set()
    for name, info in bare.infos.items():
        if not name.endswith((DOWN, UP)) or len(info.shape) != 2:
            raise CheckpointError(f"{weights.label}: {name} is not a low-rank weight; expected {DOWN} or {UP} matrices")
        if not info.dtype.is_floating_point:
            raise CheckpointError(f"{weights.label}: {name} is {info.dtype}, expected a floating dtype")
        layer, down = name.rpartition(".")[0], name.endswith(DOWN)
        if (layer + (UP if down else DOWN)) not in bare.infos:
            raise CheckpointError(f"{weights.label}: {name} has no matching {'lora_B' if down else 'lora_A'}")
        ranks.add(info.shape[0 if down else 1])
    if len(ranks) != 1:
        raise CheckpointError(f"{weights.label} has updates of ranks {sorted(ranks)}; expected a single rank")
    return StoredAdapter(bare, ranks.pop(), scaling)


def is_adapter(names: Iterable[str]) -> bool:
    """Return whether any name is that of a low-rank update."""
    return any(f"{DOWN}." in name or name.endswith(DOWN) for name in names)


def merged(base: Weights, adapter: StoredAdapter) -> Weights:
    """Return a transformer's weights with an adapter added, each computed when it is read; official names.

    Sums are computed in fp32 and rounded once, to the dtype of the weight. A weight of 4 or 8 bits becomes bf16,
    because so few bits would round most of an update away; this is logged. Raises CheckpointError if the adapter does
    not belong to the base.
    """
    changes: dict[str, Lazy | None] = {}
    widened: dict[str, int] = {}
    for layer, size in adapter.sizes.items():
        name, codes = f"{layer}.weight", f"{layer}.{CODES}"
        if codes in base.tensors:
            rows, half = base.infos[codes].shape
            parts = [base.tensors[f"{layer}.{leaf}"] for leaf in PACKED_LEAVES]
            weight: Lazy = Computed(TensorInfo((rows, 2 * half), torch.float32), partial(_dequantized, *parts))
            stored, result = "NVFP4", torch.bfloat16
            changes |= dict.fromkeys(f"{layer}.{leaf}" for leaf in PACKED_LEAVES)
        elif name in base.tensors:
            weight, result = base.tensors[name], base.infos[name].dtype
            stored, result = str(result), torch.bfloat16 if is_one_byte_float(result) else result
        else:
            raise CheckpointError(f"{adapter.weights.label} updates {layer}, which is not in {base.label}")
        if weight.info.shape != size:
            raise CheckpointError(
                f"{adapter.weights.label} updates {layer} of shape {list(size)}, but in {base.label} its shape is"
                f" {list(weight.info.shape)}"
            )
        if stored != str(result):
            widened[stored] = widened.get(stored, 0) + 1
        down, up = (adapter.weights.tensors[layer + part] for part in (DOWN, UP))
        changes[name] = Computed(
            TensorInfo(size, result), partial(_read_sum, weight, down, up, adapter.scaling, result)
        )
    for stored, count in widened.items():
        logger.warning(
            "%s: the %d layers that the adapter updates become bf16; %s would round most of the update away",
            *(base.label, count, stored.removeprefix("torch.")),
        )
    files = tuple(dict.fromkeys((*base.files, *adapter.weights.files)))
    notes = {
        **base.metadata,
        "adapter_scaling": str(adapter.scaling),
        **{f"adapter_{key}": value for key, value in adapter.weights.metadata.items()},
    }
    return Weights(base.replaced(changes).tensors, files, notes)


def layer_sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return [out, in] of the linear layers inside the blocks; the model may be on the meta device."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if name.startswith("blocks.") and isinstance(module, nn.Linear | NVFP4Linear)
    }


def _read_sum(weight: Lazy, down: Lazy, up: Lazy, scaling: float, dtype: torch.dtype) -> Tensor:
    return (read(weight).float() + scaling * (read(up).float() @ read(down).float())).to(dtype)


def _dequantized(codes: Lazy, scales: Lazy, tensor_scale: Lazy) -> Tensor:
    return reference.dequantize(NVFP4Tensor(read(codes), read(scales), read(tensor_scale)))


def _bare_name(name: str) -> str:
    """Convert a name of peft, diffusers or LongLive to an official layer name with .lora_A or .lora_B."""
    bare = names.strip_wrappers(name.removesuffix(".weight").removesuffix(ADAPTER_NAME))
    while prefix := next((prefix for prefix in PREFIXES if bare.startswith(prefix)), ""):
        bare = bare.removeprefix(prefix)
    layer, _, part = bare.rpartition(".")
    return f"{names.to_official(f'{layer}.weight').removesuffix('.weight')}.{part}"


def _diffusers_name(name: str) -> str:
    layer, _, part = name.rpartition(".")
    return f"{DIFFUSERS_PREFIX}{names.to_diffusers(f'{layer}.weight').removesuffix('.weight')}.{part}.weight"
