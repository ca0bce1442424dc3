"""LoRA weights on disk, as peft, diffusers and LongLive name them, and their sum with the weights they belong to."""

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
from longvideo.checkpoint.tensors import InMemory, Lazy, Made, TensorInfo, Weights, as_bytes, is_one_byte_float, read
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
# fields of peft's configuration that give updates another meaning
UNSUPPORTED = ("use_dora", "fan_in_fan_out", "alpha_pattern", "rank_pattern", "lora_bias")
MAX_ALPHA = 1e9
PREFIXES = (PEFT_PREFIX, DIFFUSERS_PREFIX, names.MODEL_PREFIX)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter of which only headers are read. weights: named as in `Adapter`; other fields too."""

    weights: Weights
    rank: int
    scaling: float

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """[out, in] of the layers it updates."""
        infos = self.weights.infos
        layers = [name.removesuffix(DOWN) for name in infos if name.endswith(DOWN)]
        return {layer: (infos[layer + UP].shape[0], infos[layer + DOWN].shape[1]) for layer in layers}

    def load(self) -> Adapter:
        weights = self.weights.finite()
        return Adapter({name: weights.read(name).float() for name in weights.infos}, self.rank, self.scaling)


@dataclass(frozen=True)
class Adapter:
    """Low-rank updates of a transformer's layers.

    weights: `blocks.0.self_attn.q.lora_A` [rank, in] and `.lora_B` [out, rank], under official names. scaling: what an
    update B @ A counts.
    """

    weights: Mapping[str, Tensor]
    rank: int
    scaling: float

    @property
    def layers(self) -> list[str]:
        return [name.removesuffix(DOWN) for name in self.weights if name.endswith(DOWN)]

    def stored(self) -> StoredAdapter:
        """Show it as if it had been opened; its digest stands in for the files that it would be from."""
        digest = hashlib.sha256()
        for name in sorted(self.weights):
            for piece in InMemory(self.weights[name]).pieces():
                digest.update(as_bytes(piece))
        tensors = {name: InMemory(tensor) for name, tensor in self.weights.items()}
        return StoredAdapter(Weights(tensors, metadata={"sha256": digest.hexdigest()}), self.rank, self.scaling)

    def save(self, folder: Path, *, base: str) -> None:
        """Write a folder that `peft.PeftModel.from_pretrained` reads, and beside it the file that diffusers reads.

        base: name of the model it belongs to. Diffusers' naming has no place for a scaling, so it is in those weights.
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
        """Read what `save` or peft wrote. Raises CheckpointError, naming the file, where it is no LoRA."""
        check_links(folder)
        return open_adapter_folder(folder).load()

    def check_fits(self, sizes: Mapping[str, tuple[int, int]], model: str, adapter: str) -> None:
        """Raise CheckpointError unless every update is of a layer of the model and of its size.

        sizes: [out, in] of the layers that an adapter can be of.
        """
        for layer in self.layers:
            if layer not in sizes:
                raise CheckpointError(f"{adapter} updates {layer}, which {model} has not; it belongs to another model")
            rows, columns = sizes[layer]
            found = tuple(self.weights[layer + UP].shape), tuple(self.weights[layer + DOWN].shape)
            if found != ((rows, self.rank), (self.rank, columns)):
                raise CheckpointError(
                    f"{adapter}: {layer} has updates {list(found[0])} x {list(found[1])}, wanted"
                    f" {[rows, self.rank]} x {[self.rank, columns]} for {model} at rank {self.rank}"
                )


def open_adapter_folder(folder: Path) -> StoredAdapter:
    """Open what `Adapter.save` or peft wrote. Raises CheckpointError, naming the file, where it is no LoRA."""
    config = read_json(folder / PEFT_CONFIG)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder / PEFT_CONFIG} describes no LoRA adapter with r and lora_alpha")
    return _configured(open_weights(folder, stem=PEFT_STEM), config, str(folder / PEFT_CONFIG))


def open_adapter(weights: Weights) -> StoredAdapter:
    """Open low-rank weights in anyone's naming.

    What an update counts is as diffusers writes it beside the weights, and else 1, as in LongLive's (alpha = rank).
    Raises CheckpointError, naming the tensor, where something is no low-rank weight, stands alone, or differs in rank.
    """
    if (said := weights.metadata.get(DIFFUSERS_METADATA)) is None:
        return _paired(weights, scaling=1.0)
    try:
        config = json.loads(said)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{weights.label}: {DIFFUSERS_METADATA} in its header is no JSON") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{weights.label}: {DIFFUSERS_METADATA} in its header is no JSON object")
    bare = {str(key).removeprefix(DIFFUSERS_PREFIX): value for key, value in config.items()}
    return _configured(weights, bare, weights.label)


def _configured(weights: Weights, config: Mapping[str, Any], label: str) -> StoredAdapter:
    """Open weights that come with a configuration of peft's, whose fields decide what an update counts."""
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise CheckpointError(f"{label} says r={rank!r}; wanted a whole number of at least 1")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < MAX_ALPHA:
        raise CheckpointError(f"{label} says lora_alpha={alpha!r}; wanted a number")
    for key in UNSUPPORTED:
        if config.get(key):
            raise CheckpointError(
                f"{label} says {key}={config[key]!r}, which is not supported; merge it with peft first"
            )
    stored = _paired(weights, scaling=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    if stored.rank != rank:
        raise CheckpointError(f"{label} says r={rank}, the weights have rank {stored.rank}")
    return stored


def _paired(weights: Weights, *, scaling: float) -> StoredAdapter:
    bare = weights.renamed(_bare_name)
    ranks = set()
    for name, info in bare.infos.items():
        if not name.endswith((DOWN, UP)) or len(info.shape) != 2:
            raise CheckpointError(f"{weights.label}: {name} is no low-rank weight")
        if not info.dtype.is_floating_point:
            raise CheckpointError(f"{weights.label}: {name} is {info.dtype}, wanted floating numbers")
        layer, down = name.rpartition(".")[0], name.endswith(DOWN)
        if (layer + (UP if down else DOWN)) not in bare.infos:
            raise CheckpointError(f"{weights.label}: {name} has no {'lora_B' if down else 'lora_A'} beside it")
        ranks.add(info.shape[0 if down else 1])
    if len(ranks) != 1:
        raise CheckpointError(f"{weights.label} has updates of ranks {sorted(ranks)}; wanted one rank")
    return StoredAdapter(bare, ranks.pop(), scaling)


def is_adapter(names: Iterable[str]) -> bool:
    """Say whether names are those of low-rank updates."""
    return any(f"{DOWN}." in name or name.endswith(DOWN) for name in names)


def merged(base: Weights, adapter: StoredAdapter) -> Weights:
    """Show a transformer's weights with an adapter added, each when it is read; official names.

    Sums are made in fp32 and rounded once, to the dtype of the weight. A weight of 4 or 8 bits becomes bf16, because
    such few bits would round most of an update away; a line in the log says so. Raises CheckpointError where the
    adapter does not belong to the base.
    """
    changes: dict[str, Lazy | None] = {}
    widened: dict[str, int] = {}
    for layer, size in adapter.sizes.items():
        name, codes = f"{layer}.weight", f"{layer}.{CODES}"
        if codes in base.tensors:
            rows, half = base.infos[codes].shape
            parts = [base.tensors[f"{layer}.{leaf}"] for leaf in PACKED_LEAVES]
            weight: Lazy = Made(TensorInfo((rows, 2 * half), torch.float32), partial(_dequantized, *parts))
            stored, result = "NVFP4", torch.bfloat16
            changes |= dict.fromkeys(f"{layer}.{leaf}" for leaf in PACKED_LEAVES)
        elif name in base.tensors:
            weight, result = base.tensors[name], base.infos[name].dtype
            stored, result = str(result), torch.bfloat16 if is_one_byte_float(result) else result
        else:
            raise CheckpointError(f"{adapter.weights.label} updates {layer}, which {base.label} has not")
        if weight.info.shape != size:
            raise CheckpointError(
                f"{adapter.weights.label} updates {layer} of {list(size)}, in {base.label} it is"
                f" {list(weight.info.shape)}"
            )
        if stored != str(result):
            widened[stored] = widened.get(stored, 0) + 1
        down, up = (adapter.weights.tensors[layer + part] for part in (DOWN, UP))
        changes[name] = Made(TensorInfo(size, result), partial(_read_sum, weight, down, up, adapter.scaling, result))
    for stored, count in widened.items():
        logger.warning(
            "%s: the layers that the adapter updates (%d) become bf16; %s would round most of the update away",
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
    """Reduce a name in peft's, diffusers' or LongLive's naming to an official layer and .lora_A or .lora_B."""
    bare = names.strip_wrappers(name.removesuffix(".weight").removesuffix(ADAPTER_NAME))
    while prefix := next((prefix for prefix in PREFIXES if bare.startswith(prefix)), ""):
        bare = bare.removeprefix(prefix)
    layer, _, part = bare.rpartition(".")
    return f"{names.to_official(f'{layer}.weight').removesuffix('.weight')}.{part}"


def _diffusers_name(name: str) -> str:
    layer, _, part = name.rpartition(".")
    return f"{DIFFUSERS_PREFIX}{names.to_diffusers(f'{layer}.weight').removesuffix('.weight')}.{part}.weight"
