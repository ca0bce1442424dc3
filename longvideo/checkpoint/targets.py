"""The formats that a model can be written in."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from longvideo.checkpoint import diffusers_json, longlive_packed, names, packed, pickle_file, safetensors_file
from longvideo.checkpoint.diffusers_folder import SETTINGS_FILE, write_index, write_part
from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.parts import PARTS, TEXT_ENCODER, TRANSFORMER, VAE
from longvideo.checkpoint.saving import save_weights
from longvideo.checkpoint.tensors import Weights
from longvideo.errors import CheckpointError
from longvideo.files import write_file, write_json
from longvideo.vae.config import WAN22_LATENTS_MEAN, WAN22_LATENTS_STD

OFFICIAL_STEM = "diffusion_pytorch_model"
OFFICIAL_VAE, OFFICIAL_TEXT_ENCODER = "Wan2.2_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"
OFFICIAL_TOKENIZER = Path("google/umt5-xxl")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model")


@dataclass(frozen=True)
class Work:
    """A model to be written.

    path: the folder, or the file. weights: of its parts, under our names, as they are to be. Files that are in the
    folder already are finished.
    """

    path: Path
    model: ModelFolder
    weights: Mapping[str, Weights]
    max_shard_bytes: int
    on_bytes: Callable[[int], None]

    def write_pickle(self, name: str, weights: Weights) -> None:
        file = self.path / name
        if file.is_file():  # it has this name only when it is whole
            self.on_bytes(weights.num_bytes)
        else:
            pickle_file.write_weights(file, weights, on_bytes=self.on_bytes)

    def copy_tokenizer(self, folder: Path) -> None:
        assert self.model.tokenizer is not None
        (self.path / folder).mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            if (file := self.model.tokenizer / name).is_file():
                write_file(self.path / folder / name, partial(_copy, file))


@dataclass(frozen=True)
class TargetFormat:
    """A format to write.

    parts: those that it holds. suffixes: of its file; none for a folder. check: raises where it has no place for
    something in a model. write: does the work.
    """

    parts: tuple[str, ...]
    suffixes: tuple[str, ...]
    check: Callable[[ModelFolder, Mapping[str, Weights]], None]
    write: Callable[[Work], None]


def _write_diffusers(work: Work) -> None:
    for part, weights in work.weights.items():
        write_part(
            work.path,
            part,
            weights,
            work.model.stored[part].config,
            max_shard_bytes=work.max_shard_bytes,
            go_on=True,
            on_bytes=work.on_bytes,
        )
    if TEXT_ENCODER in work.weights:
        work.copy_tokenizer(Path("tokenizer"))
    write_index(work.path, work.weights, work.model.settings)


def _write_longvideo(work: Work) -> None:
    _write_diffusers(work)
    write_json(work.path / SETTINGS_FILE, asdict(work.model.settings))
    ModelFolder.open(work.path)


def _write_official(work: Work) -> None:
    model, weights = work.model, work.weights
    save_weights(
        work.path,
        OFFICIAL_STEM,
        weights[TRANSFORMER],
        max_shard_bytes=work.max_shard_bytes,
        go_on=True,
        on_bytes=work.on_bytes,
    )
    write_json(work.path / "config.json", diffusers_json.official_json(model.transformer_config))
    if VAE in weights:
        table = names.autoencoder_official(model.vae_config.num_res_blocks)
        work.write_pickle(OFFICIAL_VAE, weights[VAE].renamed(table.theirs))
    if TEXT_ENCODER in weights:
        work.write_pickle(OFFICIAL_TEXT_ENCODER, weights[TEXT_ENCODER].renamed(names.TEXT_ENCODER_OFFICIAL.theirs))
        work.copy_tokenizer(OFFICIAL_TOKENIZER)


def _write_longlive(work: Work) -> None:
    own = longlive_packed.to_longlive(work.weights[TRANSFORMER]).renamed(lambda name: f"{names.MODEL_PREFIX}{name}")
    pickle_file.write_weights(work.path, own, within=("generator",), on_bytes=work.on_bytes)


def _write_safetensors(work: Work) -> None:
    own = work.weights[TRANSFORMER]
    header = {"format": "pt", **packed.header_metadata(own)}
    safetensors_file.write_weights(work.path, own, metadata=header, on_bytes=work.on_bytes)


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _anything(model: ModelFolder, weights: Mapping[str, Weights]) -> None:
    pass


def _needs_transformer(model: ModelFolder, weights: Mapping[str, Weights]) -> None:
    if TRANSFORMER not in weights:
        raise CheckpointError(f"{model.path} holds no transformer, which this format is of")


def _not_packed(model: ModelFolder, weights: Mapping[str, Weights]) -> None:
    if TRANSFORMER in weights and packed.is_packed(weights[TRANSFORMER]):
        raise CheckpointError(
            f"{model.path} is packed in 4 bits, for which this format has no place; convert the model it is from"
        )


def _wan_itself(model: ModelFolder, weights: Mapping[str, Weights]) -> None:
    _needs_transformer(model, weights)
    _not_packed(model, weights)
    if VAE in weights:
        config = model.vae_config
        if (config.latents_mean, config.latents_std) != (WAN22_LATENTS_MEAN, WAN22_LATENTS_STD):
            raise CheckpointError(
                f"{model.path}: the official files do not hold the statistics of latents, and Wan knows only its own;"
                " convert to longvideo or diffusers instead"
            )


TARGETS = {
    "longvideo": TargetFormat(PARTS, (), _anything, _write_longvideo),
    "diffusers": TargetFormat(PARTS, (), _not_packed, _write_diffusers),
    "official": TargetFormat(PARTS, (), _wan_itself, _write_official),
    "longlive": TargetFormat((TRANSFORMER,), (".pt", ".pth"), _needs_transformer, _write_longlive),
    "safetensors": TargetFormat((TRANSFORMER,), (".safetensors",), _needs_transformer, _write_safetensors),
}
