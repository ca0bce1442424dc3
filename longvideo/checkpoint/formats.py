"""Recognize the format of a model by its content, not by its name.

Known formats are diffusers' folders and this project's; Wan's official folder; LongLive 2.0's checkpoints (full, packed
or LoRA); the checkpoints of training runs; peft's folders; and single files in any of these namings, with the prefixes
and scales of ComfyUI, DiffSynth and NVIDIA ModelOpt.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from longvideo.checkpoint import (
    diffusers_json,
    gguf_file,
    longlive_packed,
    names,
    pickle_file,
    prefixes,
    run_checkpoint,
    shapes,
)
from longvideo.checkpoint.adapter_files import (
    PEFT_CONFIG,
    PEFT_STEM,
    is_adapter,
    open_adapter,
    open_adapter_folder,
)
from longvideo.checkpoint.diffusers_folder import (
    INDEX_FILE,
    VAE_CONFIG_FILE,
    check_latents,
    is_diffusers_folder,
    official_transformer,
    read_config,
    read_folder,
)
from longvideo.checkpoint.locations import check_inside, check_links
from longvideo.checkpoint.opening import SAFETENSORS, WeightReader, sets_of_weights, shards_of
from longvideo.checkpoint.packed import CONVENTION_KEY
from longvideo.checkpoint.parts import TEXT_ENCODER, TRANSFORMER, VAE, ModelPart, StoredModel
from longvideo.checkpoint.settings import PRESETS
from longvideo.checkpoint.stored_tokenizer import TokenizerFolder, take_tokenizer
from longvideo.checkpoint.tensors import Weights, listing
from longvideo.errors import CheckpointError
from longvideo.model.config import PRESETS as MODELS
from longvideo.model.config import TransformerConfig
from longvideo.text.umt5 import UMT5Config
from longvideo.vae.config import AutoencoderConfig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Like: TypeAlias = Mapping[str, ModelPart]
Read: TypeAlias = "Callable[[Weights, Path | None, str], StoredModel]"
"""`_stored_model` with the parts of another model."""
NOTHING: Like = {}
LONGLIVE = "longlive-2.0-5b"
RUN = "checkpoint of a training run"
HEADER_KEYS = ("format", CONVENTION_KEY)
"""Keys of safetensors metadata that describe the format; they are not notes."""
OFFICIAL_VAE = "Wan VAE (official)"
TRAINING_HEADS = "dynamic_feature_projection_heads."
"""Prefix of layers in the files of MG-LightVAE that only its distillation uses."""
FOREIGN = "belong to no part of a Wan model"
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
"""Tensor names that only one part has, in Wan's official naming and in that of diffusers or transformers. One of them
identifies a part, so a file with missing tensors is still recognized."""


def recognize(path: Path, *, entry: str | None = None, like: Like = NOTHING) -> StoredModel:
    """Read the headers of a folder or file and return its parts.

    entry: which weights of a training checkpoint to open. like: parts of another model, which provide what tensor
    shapes do not determine: the number of heads of a transformer of equal width, and the statistics of an autoencoder's
    latents. Raises CheckpointError, naming the file, for a damaged file and for an unknown format.
    """
    read = partial(_stored_model, like=like)
    if path.is_dir():
        check_links(path)
        if entry is not None and (is_diffusers_folder(path) or (path / PEFT_CONFIG).is_file()):
            raise CheckpointError(f"{path} has one set of weights and no entry {entry!r}; leave --entry out")
        if is_diffusers_folder(path):
            return read_folder(path)
        if (path / PEFT_CONFIG).is_file():
            return StoredModel("LoRA folder (peft)", {}, adapter=open_adapter_folder(path))
        if run_checkpoint.is_run_checkpoint(path):
            modules, notes = run_checkpoint.open_run_checkpoint(path, entry, MARKS)
            stored = [(path, read(weights, None, RUN)) for weights in modules]
            return replace(_combined(path, stored, {}), format=RUN, notes=notes)
        return _loose_files(path, WeightReader(entry).open_one_of_several, read)
    if path.name == f"{PEFT_STEM}.safetensors" and (path.parent / PEFT_CONFIG).is_file():
        return recognize(path.parent, entry=entry)
    weights = WeightReader(entry).open_set(shards_of(path))
    return _one_or_more(path, weights, path.parent / "config.json", "single file", read)


def _one_or_more(path: Path, weights: Weights, config: Path | None, label: str, read: Read) -> StoredModel:
    """Return the part, adapter or parts of one set of weights. Other arguments: as of `_stored_model`."""
    weights, tokenizer = take_tokenizer(weights)
    if tokenizer is not None:
        return replace(_one_or_more(path, weights, config, label, read), tokenizer=tokenizer)
    if is_adapter(weights.infos) or part_of(weights) is not None:
        return read(weights, config, label)
    divided = prefixes.divide_parts(weights)
    if len(divided) == 1:
        (own,) = divided.values()
        return read(own, config, label)
    kinds = [part_of(own) for own in divided.values()]
    for prefix, kind in zip(divided, kinds, strict=True):
        if kinds.count(kind) > 1:
            raise CheckpointError(
                f"{path} has more than one {kind}, one of them under {prefix!r}; save it in a file of its own"
            )
    stored = [(path, read(own, None, "")) for own in divided.values()]
    return replace(_combined(path.parent, stored, {}), format="file with several parts", tokenizer=None)


def _loose_files(folder: Path, open_files: Callable[[list[Path]], Weights], read: Read) -> StoredModel:
    """Combine the parts whose files are in one folder, as in Wan's official folder."""
    sets = sets_of_weights(folder, suffixes=(SAFETENSORS, gguf_file.SUFFIX, *pickle_file.SUFFIXES))
    if not sets and (nested := sorted(folder.glob(f"*/{PEFT_CONFIG}"))):
        folders = [file.parent.name for file in nested]
        raise CheckpointError(
            f"{folder} has adapters in folders of their own, {listing(folders)}; use one of them, such as"
            f" {folder / folders[0]}"
        )
    if not sets:
        raise CheckpointError(
            f"there is no {folder / INDEX_FILE}, and no weights in .safetensors, .gguf, .pt or .pth files"
        )
    config = folder / "config.json"
    stored: list[tuple[Path, StoredModel]] = []
    unused: dict[Path, str] = {}
    for files in sets:
        file, weights = files[0], open_files(files)
        divided = {} if is_adapter(weights.infos) else prefixes.divide_parts(take_tokenizer(weights)[0])
        if divided and all(part_of(own) is None for own in divided.values()):
            unused[file] = f"its tensors ({listing(list(weights.infos)[:2])}, ...) {FOREIGN}"
            continue
        stored.append((file, _one_or_more(file, weights, config, "", read)))
    if not stored:
        reasons = "; ".join(f"{file.name}: {reason}" for file, reason in unused.items())
        raise CheckpointError(f"{folder} has no part of a Wan model: {reasons}")
    return _combined(folder, stored, unused)


def _combined(folder: Path, stored: list[tuple[Path, StoredModel]], unused: dict[Path, str]) -> StoredModel:
    parts: dict[str, ModelPart] = {}
    sources: dict[str, Path] = {}
    adapters = [one for _, one in stored if one.adapter is not None]
    for file, one in stored:
        for name, part in one.parts.items():
            if name in sources:
                raise CheckpointError(
                    f"{folder} has two of {name}, in {sources[name].name} and {file.name}; use one file as the model,"
                    " and the folder as its base"
                )
            parts[name], sources[name] = part, file
    if len(adapters) > 1 or (adapters and TRANSFORMER in parts):
        raise CheckpointError(
            f"{folder} has a LoRA and other weights; use the file of the LoRA as the model, and the folder as its base"
        )
    notes = {key: value for _, one in stored for key, value in one.notes.items()}
    settings = next((one.settings for _, one in stored if one.settings is not None), None)
    official = VAE in parts and TEXT_ENCODER in parts and TRANSFORMER in parts
    return StoredModel(
        "official Wan folder"
        if official
        else f"folder of {stored[0][1].format}"
        if len(stored) == 1
        else "loose files",
        parts,
        settings,
        _tokenizer(folder) or next((one.tokenizer for _, one in stored if one.tokenizer is not None), None),
        adapters[0].adapter if adapters else None,
        notes,
        unused,
    )


def _stored_model(weights: Weights, config: Path | None, label: str, *, like: Like) -> StoredModel:
    """Return the part or adapter of one set of weights.

    config: its configuration file, if any. label: description of the format; "" uses the kind of the part.
    """
    metadata = weights.metadata
    if metadata.get("checkpoint_format") == FOREIGN_STATE and not _has_plain_weights(weights):
        raise CheckpointError(
            f"{weights.label} stores modules of TransformerEngine, which only TransformerEngine reads; export merged"
            " bf16 weights and use those"
        )
    longlive = "entry" in metadata
    notes = {key: value for key, value in metadata.items() if key not in HEADER_KEYS}
    if is_adapter(weights.infos):
        return StoredModel(
            "LongLive 2.0 LoRA" if longlive else "LoRA file", {}, adapter=open_adapter(weights), notes=notes
        )
    part = part_of(weights)
    if part is None:
        shown = listing(list(weights.infos)[:3])
        raise CheckpointError(f"{weights.label}: its tensors ({shown}, ...) {FOREIGN}")
    if part == TRANSFORMER:
        own, kind = _transformer(weights, config, like)
        # LongLive's prefix, which Wan's and diffusers' files do not have
        longlive = longlive or any(name.startswith(names.MODEL_PREFIX) for name in weights.infos)
        is_longlive = longlive or longlive_packed.is_packed(weights.renamed(names.strip_wrappers))
        # LongLive's settings are for the 5B, not for a small model with its names
        settings = PRESETS[LONGLIVE] if is_longlive and own.config == MODELS["wan2.2-ti2v-5b"] else None
        return StoredModel(kind if is_longlive else label or "transformer", {part: own}, settings, notes=notes)
    own = _autoencoder(weights, config, like) if part == VAE else _text_encoder(weights, config)
    return StoredModel(label or own.kind, {part: own}, notes=notes)


def _has_plain_weights(weights: Weights) -> bool:
    """Return whether every weight of a layer is a tensor of floats."""
    return all(info.dtype.is_floating_point for name, info in weights.infos.items() if name.endswith(".weight"))


def part_of(weights: Weights) -> str | None:
    """Return the part of a model that weights belong to, None if they belong to none."""
    bare = {names.strip_wrappers(name) for name in weights.infos}
    return next((part for mark, part in MARKS.items() if mark in bare), None)


def _transformer(weights: Weights, config: Path | None, like: Like) -> tuple[ModelPart, str]:
    stripped = weights.renamed(names.strip_wrappers)
    kind = "LongLive 2.0 checkpoint"
    if longlive_packed.is_packed(stripped):
        weights, kind = longlive_packed.to_ours(stripped), "LongLive 2.0 checkpoint, packed in 4 bits"
    weights = official_transformer(weights)
    if _official_vae_config(config) is None:
        check_latents(weights, like[TRANSFORMER].config if TRANSFORMER in like else None)
    for name, parse in CONFIGS.items():
        if config is not None and _json_of(config, name) is not None:
            own = read_config(config, parse)
            # Wan's own configuration does not store the width of text features
            return ModelPart(name, weights, replace(own, text_dim=shapes.text_dim(weights))), kind
    other = like[TRANSFORMER].config if TRANSFORMER in like else None
    if isinstance(other, TransformerConfig) and _width(weights) == other.dim:
        own = shapes.transformer_config(weights, text_len=512, head_dim=other.attention_head_dim)
        return ModelPart("Wan transformer", weights, replace(own, eps=other.eps)), kind
    return ModelPart("Wan transformer", weights, shapes.transformer_config(weights, text_len=512)), kind


def _autoencoder(weights: Weights, config: Path | None, like: Like) -> ModelPart:
    weights, kind = autoencoder_weights(weights)
    other = like[VAE].config if VAE in like else None
    if kind == OFFICIAL_VAE and (file := _official_vae_config(config)) is not None:
        return ModelPart(kind, weights, read_config(file, AutoencoderConfig.from_dict))
    check_latents(weights, other)
    if kind == OFFICIAL_VAE:
        return ModelPart(kind, weights, shapes.autoencoder_config(weights))
    values = _json_of(config, "AutoencoderKLWan")
    if values is None and isinstance(other, AutoencoderConfig):
        return ModelPart(kind, weights, other)
    own = shapes.autoencoder_config(weights) if values is None else AutoencoderConfig.from_dict(values)
    return ModelPart(kind, weights, own)


def autoencoder_weights(weights: Weights) -> tuple[Weights, str]:
    """Return the weights of an autoencoder under this project's names, and the naming of their file.

    Layers that only the training of a pruned autoencoder uses are left out.
    """
    weights = weights.renamed(names.strip_wrappers)
    weights = weights.replaced({name: None for name in weights.infos if name.startswith(TRAINING_HEADS)})
    if "decoder.head.0.gamma" not in weights.infos:
        return weights, "AutoencoderKLWan"
    blocks = {
        first: sum(name.startswith(first) and name.endswith(".residual.0.gamma") for name in weights.infos)
        for first in ("encoder.downsamples.0.downsamples.", "decoder.upsamples.0.upsamples.")
    }
    encoder_blocks, decoder_blocks = blocks.values()
    # a level of the decoder has one block more; weights of a decoder alone have only those
    table = names.autoencoder_official(encoder_blocks or decoder_blocks - 1)
    return weights.renamed(table.ours), OFFICIAL_VAE


def _text_encoder(weights: Weights, config: Path | None) -> ModelPart:
    weights = weights.renamed(names.strip_wrappers)
    if "token_embedding.weight" in weights.infos:
        weights = weights.renamed(names.TEXT_ENCODER_OFFICIAL.ours)
        return ModelPart("UMT5 (official)", weights, shapes.text_encoder_config(weights))
    values = _json_of(config, None)
    own = UMT5Config.from_dict(values) if values and values.get("model_type") == "umt5" else None
    return ModelPart("UMT5EncoderModel", weights, own or shapes.text_encoder_config(weights))


def _official_vae_config(config: Path | None) -> Path | None:
    """Return the configuration of an autoencoder that is not Wan2.2's own, next to a config.json; None if missing."""
    file = None if config is None else config.parent / VAE_CONFIG_FILE
    return file if file is not None and file.is_file() else None


def _json_of(config: Path | None, *classes: str | None) -> dict[str, Any] | None:
    """Read a config.json. Returns None if it is missing or describes a class that is not in `classes`."""
    if config is None or not config.is_file():
        return None
    values = read_config(config, dict)
    return values if values.get("_class_name") in classes else None


def _diffusers_config(json: dict[str, Any]) -> TransformerConfig:
    return diffusers_json.transformer_config(json, text_len=512)


CONFIGS = {
    diffusers_json.OFFICIAL_CLASS: diffusers_json.official_config,
    diffusers_json.TRANSFORMER_CLASS: _diffusers_config,
}


def _width(weights: Weights) -> int | None:
    info = weights.infos.get("patch_embedding.weight")
    return None if info is None or not info.shape else info.shape[0]


def _tokenizer(folder: Path) -> TokenizerFolder | None:
    """Return the tokenizer in a folder, at most two levels below; Wan's is google/umt5-xxl."""
    for depth in ("tokenizer.json", "*/tokenizer.json", "*/*/tokenizer.json"):
        if files := sorted(folder.glob(depth)):
            check_inside(files[0], os.path.realpath(folder))
            return TokenizerFolder(files[0].parent)
    return None
