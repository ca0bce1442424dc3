"""Read an adapter in any known naming: kohya and musubi, ComfyUI and lightx2v, diffusers, peft, LongLive.

A tensor's name is a prefix, the name of a layer, and an ending. The tables below list each of them; a file may combine
any prefix with any ending, as many do.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from longvideo.checkpoint import names
from longvideo.checkpoint.opening import open_weights
from longvideo.checkpoint.peft_config import MAX_ALPHA, PeftConfig
from longvideo.checkpoint.tensors import Lazy, Weights, read
from longvideo.checkpoint.updates import Difference, LowRank, StoredAdapter, Update
from longvideo.errors import CheckpointError
from longvideo.files import read_json

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

PEFT_STEM, PEFT_CONFIG, PEFT_PREFIX = "adapter_model", "adapter_config.json", "base_model.model."
DIFFUSERS_PREFIX, COMFY_PREFIX, OTHER_PREFIXES = "transformer.", "diffusion_model.", ("pipe.dit.", "unet.")
KOHYA_PREFIXES = ("lora_unet_", "lora_transformer_")
DIFFUSERS_METADATA = "lora_adapter_metadata"
PREFIXES = (PEFT_PREFIX, DIFFUSERS_PREFIX, COMFY_PREFIX, *OTHER_PREFIXES, names.MODEL_PREFIX)

DOWN, UP, UP_BIAS, MAGNITUDE = "lora_A", "lora_B", "bias of lora_B", "lora_magnitude_vector"
ALPHA, WEIGHT_CHANGE, BIAS_CHANGE, MODULATION_CHANGE = "alpha", "diff", "diff_b", "diff_m"
_NAME = r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?"
ENDINGS = {
    re.compile(rf"\.lora_A{_NAME}(\.weight)?$"): DOWN,
    re.compile(rf"\.lora_B{_NAME}(\.weight)?$"): UP,
    re.compile(rf"\.lora_B{_NAME}\.bias$"): UP_BIAS,
    re.compile(rf"\.lora_magnitude_vector{_NAME}(\.weight)?$"): MAGNITUDE,
    re.compile(r"\.lora(_|\.)down\.weight$"): DOWN,
    re.compile(r"\.lora(_|\.)up\.weight$"): UP,
    re.compile(r"\.alpha$"): ALPHA,
    re.compile(r"\.diff$"): WEIGHT_CHANGE,
    re.compile(r"\.diff_b$"): BIAS_CHANGE,
    re.compile(r"\.diff_m$"): MODULATION_CHANGE,
}
KOHYA_ROLES = {DOWN: "lora_down", UP: "lora_up"}
DIFFERENCES = {WEIGHT_CHANGE: "weight", BIAS_CHANGE: "bias", MODULATION_CHANGE: "modulation"}
OTHER_KINDS = {
    ".hada_": "LoHa",
    ".lokr_": "LoKr",
    ".oft_": "OFT",
    ".boft_": "BOFT",
    ".dora_scale": "DoRA of LyCORIS",
    ".lora_mid.": "LoCon with three factors",
}
"""Parts of names that only adapters of other kinds have, which are refused."""


def is_adapter(tensor_names: Iterable[str]) -> bool:
    """Return whether any name is that of an update. Those of alphas do not count."""
    return any(
        any(mark in name for mark in OTHER_KINDS) or ((ending := _ending(name)) is not None and ending.role != ALPHA)
        for name in tensor_names
    )


def open_adapter_folder(folder: Path) -> StoredAdapter:
    """Open a folder that `Adapter.save` or peft wrote. Raises CheckpointError, naming the file, if it is not a LoRA."""
    file = folder / PEFT_CONFIG
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{file} has peft_type={config.get('peft_type')!r}; expected LORA, with r and lora_alpha")
    return _opened(open_weights(folder, stem=PEFT_STEM), PeftConfig.parse(config, str(file)))


def open_adapter(weights: Weights, *, scale: float = 1.0) -> StoredAdapter:
    """Open the weights of an adapter in any known naming.

    The factor of a layer's update is alpha / rank where the file has an alpha for the layer, otherwise that of the
    configuration which diffusers writes into the header, otherwise `scale`: 1 in LongLive's files (alpha = rank).
    Raises CheckpointError with the tensor's name if it is not an update, if its counterpart is missing, and if the
    ranks of the two differ.
    """
    if (text := weights.metadata.get(DIFFUSERS_METADATA)) is None:
        return _opened(weights, scale)
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{weights.label}: {DIFFUSERS_METADATA} in its header is not JSON") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{weights.label}: {DIFFUSERS_METADATA} in its header is not a JSON object")
    bare = {str(key).removeprefix(DIFFUSERS_PREFIX): value for key, value in config.items()}
    return _opened(weights, PeftConfig.parse(bare, weights.label))


@dataclass(frozen=True)
class _Ending:
    """The end of a tensor's name. stem: what is before it. adapter: name of the adapter in peft."""

    stem: str
    role: str
    adapter: str | None


@dataclass
class _Layer:
    """The tensors of a layer. name: official. trained_name: name in the trained model. parts: tensors by role."""

    name: str
    trained_name: str
    parts: dict[str, tuple[str, Lazy]] = field(default_factory=dict)


def _opened(weights: Weights, scaling: PeftConfig | float) -> StoredAdapter:
    updates: dict[str, list[Update]] = {}
    for layer in _layers(weights):
        for parameter, update in _updates(layer, scaling, weights.label):
            updates.setdefault(parameter, []).append(update)
    if not updates:
        raise CheckpointError(f"{weights.label} has no update of any layer; use another file")
    return StoredAdapter(weights.label, updates, weights.files, weights.metadata)


def _layers(weights: Weights) -> list[_Layer]:
    """Sort the tensors of a file by layer. Raises CheckpointError for a name that is not that of an update."""
    layers: dict[str, _Layer] = {}
    adapters: set[str] = set()
    for tensor_name, tensor in weights.tensors.items():
        if kind := next((kind for mark, kind in OTHER_KINDS.items() if mark in tensor_name), None):
            raise CheckpointError(
                f"{weights.label}: {tensor_name} belongs to {kind}, which is not supported; merge it into the model"
                " with the program that made it"
            )
        if (ending := _ending(tensor_name)) is None:
            raise CheckpointError(
                f"{weights.label}: {tensor_name} is not an update of a layer; expected names that end in lora_A.weight,"
                " lora_down.weight, alpha, diff, diff_b or the like"
            )
        if not tensor.info.dtype.is_floating_point and ending.role != ALPHA:
            raise CheckpointError(f"{weights.label}: {tensor_name} is {tensor.info.dtype}, expected a floating dtype")
        adapters |= set() if ending.adapter is None else {ending.adapter}
        official, trained = _layer_names(ending.stem)
        layer = layers.setdefault(official, _Layer(official, trained))
        if ending.role in layer.parts:
            raise CheckpointError(
                f"{weights.label}: {layer.parts[ending.role][0]!r} and {tensor_name!r} are both the {ending.role} of"
                f" {official}; remove one"
            )
        layer.parts[ending.role] = tensor_name, tensor
    if len(adapters) > 1:
        raise CheckpointError(
            f"{weights.label} has several adapters, {', '.join(sorted(adapters))}; save each in a file of its own"
        )
    return list(layers.values())


def _updates(layer: _Layer, scaling: PeftConfig | float, label: str) -> list[tuple[str, Update]]:
    """Return the updates of a layer, with the parameters that they change."""
    updates: list[tuple[str, Update]] = []
    for role, parameter in DIFFERENCES.items():
        if role in layer.parts:
            updates.append((f"{layer.name}.{parameter}", Difference(layer.parts[role][1])))
    low_rank = [role for role in ENDINGS.values() if role in layer.parts and role not in DIFFERENCES]
    for other in (DOWN, UP):
        if low_rank and other not in layer.parts:
            raise CheckpointError(
                f"{label}: {layer.parts[low_rank[0]][0]} has no matching {other} or {KOHYA_ROLES[other]}; the file is"
                " incomplete, copy or save it again"
            )
    if DOWN not in layer.parts:
        return updates
    down, up = layer.parts[DOWN][1], layer.parts[UP][1]
    rank = _check_factors(layer, label)
    if ALPHA in layer.parts:
        scale = _read_alpha(layer, label) / rank
    else:
        scale = scaling.scale(layer.trained_name, rank) if isinstance(scaling, PeftConfig) else scaling
    if isinstance(scaling, PeftConfig) and scaling.dora and MAGNITUDE not in layer.parts:
        raise CheckpointError(f"{label}: {layer.name} has no {MAGNITUDE}, but use_dora is set; save the adapter again")
    magnitude = layer.parts[MAGNITUDE][1] if MAGNITUDE in layer.parts else None
    if magnitude is not None and magnitude.info.num_values != up.info.shape[0]:
        raise CheckpointError(
            f"{label}: {layer.parts[MAGNITUDE][0]} has shape {list(magnitude.info.shape)}, expected"
            f" [{up.info.shape[0]}], the outputs of {layer.name}"
        )
    updates.append((f"{layer.name}.weight", LowRank(down, up, scale, magnitude)))
    if UP_BIAS in layer.parts:
        updates.append((f"{layer.name}.bias", Difference(layer.parts[UP_BIAS][1], scale)))
    return updates


def _check_factors(layer: _Layer, label: str) -> int:
    """Return the rank of a layer's update. Raises CheckpointError if its two factors do not fit each other."""
    (down_name, down), (up_name, up) = layer.parts[DOWN], layer.parts[UP]
    narrow, wide = down.info.shape, up.info.shape
    for tensor_name, shape in ((down_name, narrow), (up_name, wide)):
        if len(shape) < 2 or 0 in shape:
            raise CheckpointError(f"{label}: {tensor_name} has shape {list(shape)}; expected a matrix")
    if narrow[0] != wide[1]:
        raise CheckpointError(
            f"{label}: {down_name} has rank {narrow[0]}, but {up_name} has rank {wide[1]}; expected equal ranks"
        )
    if math.prod(wide[2:]) != 1:
        raise CheckpointError(f"{label}: {up_name} has shape {list(wide)}; expected a kernel of size 1")
    return narrow[0]


def _read_alpha(layer: _Layer, label: str) -> float:
    tensor_name, tensor = layer.parts[ALPHA]
    if tensor.info.num_values != 1:
        raise CheckpointError(f"{label}: {tensor_name} has shape {list(tensor.info.shape)}; expected one number")
    alpha = float(read(tensor))
    if not abs(alpha) < MAX_ALPHA:
        raise CheckpointError(f"{label}: {tensor_name} is {alpha}; expected a number")
    return alpha


def _ending(tensor_name: str) -> _Ending | None:
    """Divide a tensor's name. Returns None for one that is not an update."""
    for pattern, role in ENDINGS.items():
        if match := pattern.search(tensor_name):
            groups = match.groupdict()
            return _Ending(tensor_name[: match.start()], role, groups.get("adapter"))
    return None


def _layer_names(stem: str) -> tuple[str, str]:
    """Return the official name of a layer, and its name in the trained model. stem: name with prefixes."""
    bare = names.strip_wrappers(stem)
    while prefix := next((prefix for prefix in PREFIXES if bare.startswith(prefix)), ""):
        bare = bare.removeprefix(prefix)
    if kohya := next((prefix for prefix in KOHYA_PREFIXES if bare.startswith(prefix)), ""):
        return names.from_underscores(bare.removeprefix(kohya)), bare
    return names.to_official(f"{bare}.weight").removesuffix(".weight"), bare
