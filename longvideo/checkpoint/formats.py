"""Recognise what a path holds, by its content and not by its name.

Known are diffusers' folders and ours; Wan's official folder; LongLive 2.0's checkpoints, whole, packed or LoRA; the
checkpoints of training runs; peft's folders; and single files of any of these names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from longvideo.checkpoint import diffusers_json, longlive_packed, names, pickle_file, run_checkpoint, shapes
from longvideo.checkpoint.adapters import PEFT_CONFIG, is_adapter, open_adapter, open_adapter_folder
from longvideo.checkpoint.diffusers_folder import (
    INDEX_FILE,
    is_diffusers_folder,
    official_transformer,
    read_config,
    read_folder,
)
from longvideo.checkpoint.locations import check_inside, check_links
from longvideo.checkpoint.opening import open_weights, sets_of_weights
from longvideo.checkpoint.packed import CONVENTION_KEY
from longvideo.checkpoint.parts import TEXT_ENCODER, TRANSFORMER, VAE, Found, ModelPart
from longvideo.checkpoint.settings import PRESETS
from longvideo.checkpoint.tensors import Weights, listing
from longvideo.errors import CheckpointError
from longvideo.model.config import PRESETS as MODELS
from longvideo.model.config import TransformerConfig
from longvideo.text.umt5 import UMT5Config
from longvideo.vae.config import AutoencoderConfig

if TYPE_CHECKING:
    from pathlib import Path

Like: TypeAlias = Mapping[str, ModelPart]
NOTHING: Like = {}
LONGLIVE = "longlive-2.0-5b"
RUN = "checkpoint of a training run"
HEADER_KEYS = ("format", CONVENTION_KEY)
"""Of safetensors metadata, what says how to read them."""
FOREIGN_STATE = "longlive_generator_te_nvfp4"
MARKS = {
    "encoder.head.0.gamma": VAE,
    "decoder.head.0.gamma": VAE,
    "quant_conv.weight": VAE,
    "post_quant_conv.weight": VAE,
    "token_embedding.weight": TEXT_ENCODER,
    "blocks.0.pos_embedding.embedding.weight": TEXT_ENCODER,
    "shared.weight": TEXT_ENCODER,
    "encoder.final_layer_norm.weight": TEXT_ENCODER,
    **dict.fromkeys((*names.OFFICIAL_MARKS, *names.DIFFUSERS_MARKS, *names.COMMON_MARKS), TRANSFORMER),
}
"""Names that no other part has, in Wan's official naming and in diffusers' or transformers'. One of them is enough, so
that a file that lacks some is still known for what it is."""


def recognise(path: Path, *, entry: str | None = None, like: Like = NOTHING) -> Found:
    """Read the headers of what lies at a path.

    entry: of a training checkpoint, which of its dicts is wanted. like: parts of another model, which say what shapes
    do not: the heads of a transformer as wide, the statistics of an autoencoder's latents. Raises CheckpointError,
    naming the file, for what is damaged or unknown.
    """
    if path.is_dir():
        check_links(path)
        if entry is not None and (is_diffusers_folder(path) or (path / PEFT_CONFIG).is_file()):
            raise CheckpointError(f"{path} holds one set of weights, and so has no entry {entry!r}")
        if is_diffusers_folder(path):
            return read_folder(path)
        if (path / PEFT_CONFIG).is_file():
            return Found("LoRA folder (peft)", {}, adapter=open_adapter_folder(path))
        if run_checkpoint.is_run_checkpoint(path):
            modules, notes = run_checkpoint.open_run_checkpoint(path, entry, MARKS)
            found = [(path, _found(weights, None, like, RUN)) for weights in modules]
            return replace(_together(path, found, {}), format=RUN, notes=notes)
        return _loose_files(path, entry, like)
    weights = open_weights(path, entry=entry)
    return _found(weights, path.parent / "config.json", like, "single file")


def _open_beside_others(file: Path, entry: str | None) -> Weights:
    """Open a file, and of it an entry if it has that."""
    if file.suffix not in pickle_file.SUFFIXES:
        return open_weights(file)
    try:
        return open_weights(file, entry=entry)
    except pickle_file.NoEntry:
        return open_weights(file)


def _loose_files(folder: Path, entry: str | None, like: Like) -> Found:
    """Put together the parts whose files lie side by side, as in Wan's official folder."""
    files = [*sets_of_weights(folder), *sorted(x for x in folder.iterdir() if x.suffix in pickle_file.SUFFIXES)]
    if not files:
        raise CheckpointError(f"no {folder / INDEX_FILE}, and no weights beside it: .safetensors, .pt or .pth")
    config = folder / "config.json"
    found: list[tuple[Path, Found]] = []
    unused: dict[Path, str] = {}
    for file in files:
        weights = _open_beside_others(file, entry)
        if _part_of(weights) is None and not is_adapter(weights.infos):
            unused[file] = f"its tensors ({listing(list(weights.infos)[:2])}, ...) are of no part of a Wan model"
            continue
        found.append((file, _found(weights, config, like, "")))
    if not found:
        raise CheckpointError(f"{folder}: nothing in it is of a Wan model; " + "; ".join(map(_said, unused.items())))
    return _together(folder, found, unused)


def _together(folder: Path, found: list[tuple[Path, Found]], unused: dict[Path, str]) -> Found:
    parts: dict[str, ModelPart] = {}
    home: dict[str, Path] = {}
    adapters = [one for _, one in found if one.adapter is not None]
    for file, one in found:
        for name, part in one.parts.items():
            if name in home:
                raise CheckpointError(
                    f"{folder} holds two of {name}, in {home[name].name} and {file.name}; name the file you want as the"
                    " model, and the folder as its base"
                )
            parts[name], home[name] = part, file
    if len(adapters) > 1 or (adapters and TRANSFORMER in parts):
        raise CheckpointError(f"{folder} holds a LoRA beside other weights; name its file, and the folder as its base")
    notes = {key: value for _, one in found for key, value in one.notes.items()}
    settings = next((one.settings for _, one in found if one.settings is not None), None)
    official = VAE in parts and TEXT_ENCODER in parts and TRANSFORMER in parts
    return Found(
        "official Wan folder" if official else f"folder of {found[0][1].format}" if len(found) == 1 else "loose files",
        parts,
        settings,
        _tokenizer(folder),
        adapters[0].adapter if adapters else None,
        notes,
        unused,
    )


def _found(weights: Weights, config: Path | None, like: Like, label: str) -> Found:
    """Turn one set of weights into the part or adapter that it is. label: what to call it, if not by its kind."""
    metadata = weights.metadata
    if metadata.get("checkpoint_format") == FOREIGN_STATE:
        raise CheckpointError(
            f"{weights.label} holds the state of TransformerEngine's modules, which nothing else can read; export the"
            " merged bf16 weights instead"
        )
    longlive = "entry" in metadata
    notes = {key: value for key, value in metadata.items() if key not in HEADER_KEYS}
    if is_adapter(weights.infos):
        return Found("LongLive 2.0 LoRA" if longlive else "LoRA file", {}, adapter=open_adapter(weights), notes=notes)
    part = _part_of(weights)
    if part is None:
        shown = listing(list(weights.infos)[:3])
        raise CheckpointError(f"{weights.label}: its tensors ({shown}, ...) are of no part of a Wan model")
    if part == TRANSFORMER:
        own, kind = _transformer(weights, config, like)
        # that project's own prefix, which Wan's and diffusers' files do not have
        longlive = longlive or any(name.startswith(names.MODEL_PREFIX) for name in weights.infos)
        is_longlive = longlive or longlive_packed.is_packed(weights.renamed(names.strip_wrappers))
        # a small model in that project's names is none that its settings were chosen for
        settings = PRESETS[LONGLIVE] if is_longlive and own.config == MODELS["wan2.2-ti2v-5b"] else None
        return Found(kind if is_longlive else label or "transformer", {part: own}, settings, notes=notes)
    own = _autoencoder(weights, config, like) if part == VAE else _text_encoder(weights, config)
    return Found(label or own.kind, {part: own}, notes=notes)


def _part_of(weights: Weights) -> str | None:
    bare = {names.strip_wrappers(name) for name in weights.infos}
    return next((part for mark, part in MARKS.items() if mark in bare), None)


def _transformer(weights: Weights, config: Path | None, like: Like) -> tuple[ModelPart, str]:
    stripped = weights.renamed(names.strip_wrappers)
    kind = "LongLive 2.0 checkpoint"
    if longlive_packed.is_packed(stripped):
        weights, kind = longlive_packed.to_ours(stripped), "LongLive 2.0 checkpoint, packed in 4 bits"
    weights = official_transformer(weights)
    for name, parse in CONFIGS.items():
        if config is not None and _json_of(config, name) is not None:
            own = read_config(config, parse)
            # Wan's own configuration does not say how wide the text features are
            return ModelPart(name, weights, replace(own, text_dim=shapes.text_dim(weights))), kind
    other = like[TRANSFORMER].config if TRANSFORMER in like else None
    if isinstance(other, TransformerConfig) and _width(weights) == other.dim:
        own = shapes.transformer_config(weights, text_len=512, head_dim=other.attention_head_dim)
        return ModelPart("Wan transformer", weights, replace(own, eps=other.eps)), kind
    return ModelPart("Wan transformer", weights, shapes.transformer_config(weights, text_len=512)), kind


def _autoencoder(weights: Weights, config: Path | None, like: Like) -> ModelPart:
    weights = weights.renamed(names.strip_wrappers)
    if "decoder.head.0.gamma" not in weights.infos:
        said = _json_of(config, "AutoencoderKLWan")
        other = like[VAE].config if VAE in like else None
        if said is None and isinstance(other, AutoencoderConfig):
            return ModelPart("AutoencoderKLWan", weights, other)
        own = shapes.autoencoder_config(weights) if said is None else AutoencoderConfig.from_dict(said)
        return ModelPart("AutoencoderKLWan", weights, own)
    first = "encoder.downsamples.0.downsamples."
    num_res_blocks = sum(name.startswith(first) and name.endswith(".residual.0.gamma") for name in weights.infos)
    weights = weights.renamed(names.autoencoder_official(num_res_blocks).ours)
    return ModelPart("Wan VAE (official)", weights, shapes.autoencoder_config(weights))


def _text_encoder(weights: Weights, config: Path | None) -> ModelPart:
    weights = weights.renamed(names.strip_wrappers)
    if "token_embedding.weight" in weights.infos:
        weights = weights.renamed(names.TEXT_ENCODER_OFFICIAL.ours)
        return ModelPart("UMT5 (official)", weights, shapes.text_encoder_config(weights))
    said = _json_of(config, None)
    own = UMT5Config.from_dict(said) if said and said.get("model_type") == "umt5" else None
    return ModelPart("UMT5EncoderModel", weights, own or shapes.text_encoder_config(weights))


def _json_of(config: Path | None, *classes: str | None) -> dict[str, Any] | None:
    """Read the config.json beside weights, if it is there and of one of these classes."""
    if config is None or not config.is_file():
        return None
    said = read_config(config, dict)
    return said if said.get("_class_name") in classes else None


def _diffusers_config(json: dict[str, Any]) -> TransformerConfig:
    return diffusers_json.transformer_config(json, text_len=512)


CONFIGS = {
    diffusers_json.OFFICIAL_CLASS: diffusers_json.official_config,
    diffusers_json.TRANSFORMER_CLASS: _diffusers_config,
}


def _width(weights: Weights) -> int | None:
    info = weights.infos.get("patch_embedding.weight")
    return None if info is None or not info.shape else info.shape[0]


def _tokenizer(folder: Path) -> Path | None:
    """Find the folder with tokenizer.json: Wan's is google/umt5-xxl."""
    for depth in ("tokenizer.json", "*/tokenizer.json", "*/*/tokenizer.json"):
        if found := sorted(folder.glob(depth)):
            check_inside(found[0], os.path.realpath(folder))
            return found[0].parent
    return None


def _said(item: tuple[Path, str]) -> str:
    return f"{item[0].name}: {item[1]}"
