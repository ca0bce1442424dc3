"""Read and write diffusers' folder layout: model_index.json, a folder for every part, and longvideo.json."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from longvideo.checkpoint import diffusers_json, names, packed
from longvideo.checkpoint.locations import SHIPPED, check_inside, check_links, locate
from longvideo.checkpoint.opening import open_weights
from longvideo.checkpoint.parts import PARTS, TEXT_ENCODER, TRANSFORMER, VAE, ModelPart, PartConfig, StoredModel
from longvideo.checkpoint.saving import SaveOptions, save_weights
from longvideo.checkpoint.settings import ModelSettings
from longvideo.checkpoint.stored_tokenizer import TokenizerFolder, take_tokenizer
from longvideo.config.loading import load_config
from longvideo.errors import CheckpointError, UserError
from longvideo.files import copy_file, read_json, write_json
from longvideo.model.config import TransformerConfig
from longvideo.text.umt5 import UMT5Config
from longvideo.vae.config import AutoencoderConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from longvideo.checkpoint.tensors import Weights

T = TypeVar("T")

SETTINGS_FILE = "longvideo.json"
INDEX_FILE = "model_index.json"
VAE_CONFIG_FILE = "vae_config.json"
"""File of an official folder with the configuration of an autoencoder that is not Wan2.2's own."""
SMALL_FILE = "decoder.safetensors"
"""File of the small decoder of a model's latents."""
WAN21_CHANNELS = (16, 36)
"""Latent channels of Wan2.1: of its latents, and with a picture and its mask."""
LATENT_AXES = 5
SECOND_TRANSFORMER = "transformer_2"
WEIGHT_STEMS = {TRANSFORMER: "diffusion_pytorch_model", VAE: "diffusion_pytorch_model", TEXT_ENCODER: "model"}


def is_diffusers_folder(path: Path) -> bool:
    """Return whether a folder has a model_index.json."""
    return (path / INDEX_FILE).is_file()


def read_folder(path: Path) -> StoredModel:
    """Read the configurations of a folder and the headers of its weights.

    Raises CheckpointError or ConfigError, with the file name, if something is missing or inconsistent.
    """
    index = read_json(path / INDEX_FILE)
    kinds = {part: kind for part in PARTS if (kind := _listed_class(index.get(part)))}
    if _listed_class(index.get(SECOND_TRANSFORMER)):
        raise CheckpointError(f"{path / INDEX_FILE} lists two transformers, as Wan2.2's 14B has; expected one")
    stored = read_settings(path / SETTINGS_FILE) if (path / SETTINGS_FILE).is_file() else None
    elsewhere = {part: _other_folder(path, part, name) for part, name in stored.parts.items()} if stored else {}
    if both := sorted(kinds.keys() & elsewhere.keys()):
        raise CheckpointError(
            f"{path / SETTINGS_FILE} takes {both[0]} from another folder, but {INDEX_FILE} lists it too; remove one"
        )
    kinds |= {part: _class_in(folder, part) for part, folder in elsewhere.items()}
    if not kinds:
        raise CheckpointError(f"{path / INDEX_FILE} lists no part of a model; expected one of {', '.join(PARTS)}")
    text_len = (stored or ModelSettings()).text_len
    places = {part: elsewhere.get(part, path) for part in kinds}
    parts = {part: _read_part(places[part] / part, part, kind, text_len=text_len) for part, kind in kinds.items()}
    if stored is None:
        for part in parts.values():
            check_latents(part.weights, None)
    return StoredModel(
        "longvideo folder (diffusers' layout)" if stored else "diffusers folder",
        parts,
        stored.settings if stored else None,
        TokenizerFolder(places[TEXT_ENCODER] / "tokenizer") if TEXT_ENCODER in parts else None,
        notes={part: f"from {folder}" for part, folder in elsewhere.items()},
    )


@dataclass(frozen=True)
class StoredSettings(ModelSettings):
    """The contents of longvideo.json.

    parts: for each part that is stored in another model's folder, the name of that model: a packaged one, or a folder
    next to this one.
    """

    parts: dict[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> ModelSettings:
        """The settings without `parts`."""
        return ModelSettings(**{key.name: getattr(self, key.name) for key in fields(ModelSettings)})


def read_settings(file: Path) -> StoredSettings:
    """Read a longvideo.json. Raises CheckpointError or ConfigError, with the file name, for anything else."""

    def parse(values: dict[str, Any]) -> StoredSettings:
        for key, value in values.items():
            is_flag = isinstance(getattr(StoredSettings, key, value), bool)
            if is_flag != isinstance(value, bool):
                expected = "true or false" if is_flag else "another kind of value"
                raise CheckpointError(f"{key} is {str(value)[:60]}, expected {expected}")
            if "${" in str(value):
                raise CheckpointError(f"{key} contains ${{, but placeholders are not filled in; write the value itself")
        return load_config(StoredSettings, [file])

    return read_config(file, parse)


def _other_folder(folder: Path, part: str, name: str) -> Path:
    """Return the folder that stores a part of the model in `folder`.

    name: a packaged model or a folder next to `folder`. Raises CheckpointError for another name.
    """
    file = folder / SETTINGS_FILE
    if part not in PARTS:
        raise CheckpointError(f"{file} has {part!r} in parts; expected one of {', '.join(PARTS)}")
    if name in SHIPPED:
        return locate(name)
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise CheckpointError(
            f"{file} takes {part} from {name!r}; expected {', '.join(SHIPPED)} or the name of a folder next to {folder}"
        )
    real = Path(os.path.realpath(folder))
    other = real.parent / name
    if other == real or not is_diffusers_folder(other):
        raise CheckpointError(
            f"{file} takes {part} from {name!r}, but {other} is not another model folder; copy that model there"
        )
    check_inside(other, str(real.parent))
    check_links(other)
    return other


def _class_in(folder: Path, part: str) -> str:
    """Return the class of a part that is stored in the folder itself."""
    if kind := _listed_class(read_json(folder / INDEX_FILE).get(part)):
        return kind
    raise CheckpointError(f"{folder} does not store its own {part}; use the name of the folder that stores it")


def write_part(
    folder: Path,
    part: str,
    weights: Weights,
    config: PartConfig,
    *,
    options: SaveOptions,
) -> None:
    """Write the folder of a part. weights: under this project's names."""
    metadata = packed.header_metadata(weights)
    if part == TRANSFORMER:
        weights = weights.renamed(names.to_diffusers)
    save_weights(folder / part, WEIGHT_STEMS[part], weights, metadata=metadata, options=options)
    _write_config(folder / part, config, metadata)


def copy_part(folder: Path, part: str, source: ModelPart, *, options: SaveOptions) -> None:
    """Copy a part of another model unchanged: the files of its weights, or its tensors where it has another layout."""
    if source.folder is None:
        write_part(folder, part, source.weights, source.config, options=options)
        return
    (folder / part).mkdir(parents=True, exist_ok=True)
    files = {*source.weights.files, *source.folder.glob(f"{WEIGHT_STEMS[part]}.safetensors.index.json")}
    for file in sorted(files):
        copy_file(file, folder / part / file.name)
    _write_config(folder / part, source.config, packed.header_metadata(source.weights))


def _write_config(folder: Path, config: PartConfig, metadata: Mapping[str, str]) -> None:
    if isinstance(config, TransformerConfig):
        values = {**diffusers_json.transformer_json(config), **packed.config_entry(metadata)}
    else:
        values = config.to_dict()
    write_json(folder / "config.json", values)


def write_index(folder: Path, parts: Iterable[str], settings: ModelSettings) -> None:
    """Write model_index.json, which lists the parts, and the configuration of diffusers' solver."""
    listed = ("scheduler", *parts)
    if TEXT_ENCODER in listed:
        listed += ("tokenizer",)
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", diffusers_json.scheduler_json(settings))
    write_json(folder / INDEX_FILE, diffusers_json.model_index(listed))


def read_config(file: Path, parse: Callable[[dict[str, Any]], T]) -> T:
    """Parse a JSON file; errors of `parse` are raised with the file name."""
    try:
        return parse(read_json(file))
    except UserError as error:
        if str(file) in str(error):
            raise
        raise CheckpointError(f"{file}: {error}") from error


def official_transformer(weights: Weights) -> Weights:
    """Return a transformer's weights under official names, from official or diffusers' names.

    Raises CheckpointError for another naming, and for packed weights with another convention.
    """
    try:
        weights = weights.renamed(names.official_naming(weights.infos))
    except CheckpointError as error:
        raise CheckpointError(f"{weights.label}: {error}") from error
    packed.check_convention(weights)
    return weights


def _read_part(folder: Path, part: str, kind: str, *, text_len: int) -> ModelPart:
    def parse(json: dict[str, Any]) -> PartConfig:
        if part == TRANSFORMER:
            return diffusers_json.transformer_config(json, text_len=text_len)
        return AutoencoderConfig.from_dict(json) if part == VAE else UMT5Config.from_dict(json)

    config = read_config(folder / "config.json", parse)
    weights, _ = take_tokenizer(open_weights(folder, stem=WEIGHT_STEMS[part]).renamed(names.strip_wrappers))
    weights = official_transformer(weights) if part == TRANSFORMER else weights
    return ModelPart(kind, weights, config, folder)


def check_latents(weights: Weights, like: PartConfig | None) -> None:
    """Raise CheckpointError for a transformer or an autoencoder of Wan2.1's latents.

    weights: under this project's names. like: configuration of the same part of another model; one with as many latent
    channels shows that the model is of this project.
    """
    first = weights.infos.get("patch_embedding.weight") or weights.infos.get("post_quant_conv.weight")
    if first is None or len(first.shape) != LATENT_AXES or first.shape[1] not in WAN21_CHANNELS:
        return
    known = like.in_channels if isinstance(like, TransformerConfig) else getattr(like, "z_dim", None)
    if known == first.shape[1]:
        return
    name = "LongLive 1" if "entry" in weights.metadata else "Wan2.1"
    raise CheckpointError(
        f"{weights.label} is of {name}: it has {first.shape[1]} latent channels, as Wan2.1, LongLive 1 and Wan2.2-A14B"
        " have; expected the 48 of Wan2.2-TI2V-5B and LongLive 2.0; use one of those"
    )


def _listed_class(entry: object) -> str:
    """Return the class of an entry [library, class] of model_index.json; "" for a missing part."""
    return entry[1] if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str) else ""
