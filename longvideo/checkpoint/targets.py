"""The formats in which a model can be written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from longvideo.checkpoint import diffusers_json, longlive_packed, names, packed, pickle_file, safetensors_file, scaled
from longvideo.checkpoint.diffusers_folder import (
    SETTINGS_FILE,
    SMALL_FILE,
    VAE_CONFIG_FILE,
    write_index,
    write_part,
)
from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.fp8_layers import has_fp8_layers
from longvideo.checkpoint.parts import PARTS, TEXT_ENCODER, TRANSFORMER, VAE
from longvideo.checkpoint.saving import SaveOptions, save_weights
from longvideo.checkpoint.tensors import Weights
from longvideo.errors import CheckpointError
from longvideo.files import copy_file, read_json, write_json
from longvideo.vae.config import WAN22_LATENTS_MEAN, WAN22_LATENTS_STD

if TYPE_CHECKING:
    from longvideo.checkpoint.choices import TargetName

OFFICIAL_STEM = "diffusion_pytorch_model"
OFFICIAL_VAE, OFFICIAL_TEXT_ENCODER = "Wan2.2_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"
OFFICIAL_TOKENIZER = Path("google/umt5-xxl")


@dataclass(frozen=True)
class ConversionTask:
    """A conversion in progress.

    path: folder or file to write; files that are in the folder already are finished. model: the source. weights: of the
    parts to write, under this project's names and in their final precision. options: how safetensors are written.
    """

    path: Path
    model: ModelFolder
    weights: Mapping[str, Weights]
    options: SaveOptions

    def write_pickle(self, name: str, weights: Weights) -> None:
        """Write a .pth file, unless it exists."""
        file = self.path / name
        if file.is_file():  # a file gets its name when it is complete
            self.options.on_bytes(weights.num_bytes)
        else:
            pickle_file.write_weights(file, weights, on_bytes=self.options.on_bytes)

    def copy_tokenizer(self, folder: Path) -> None:
        """Write the files of the tokenizer. folder: relative to `path`."""
        tokenizer, rows = self.model.tokenizer, self.model.text_encoder_config.vocab_size
        assert tokenizer is not None
        tokenizer.write(self.path / folder, rows=rows, text_len=self.model.settings.text_len)


@dataclass(frozen=True)
class TargetFormat:
    """A format that can be written.

    parts: parts of a model that it can store. suffixes: allowed for its file; empty for a folder. check: raises
    CheckpointError if it cannot store something of a model. write: writes a model.
    """

    parts: tuple[str, ...]
    suffixes: tuple[str, ...]
    check: Callable[[ModelFolder, Mapping[str, Weights]], None]
    write: Callable[[ConversionTask], None]


def _write_diffusers(task: ConversionTask) -> None:
    for part, weights in task.weights.items():
        write_part(task.path, part, weights, task.model.stored[part].config, options=task.options)
    if TEXT_ENCODER in task.weights:
        task.copy_tokenizer(Path("tokenizer"))
    write_index(task.path, task.weights, task.model.settings)


def _write_longvideo(task: ConversionTask) -> None:
    _write_diffusers(task)
    own = task.model.stored.get(VAE)
    if own is not None and own.folder is not None and (own.folder.parent / SMALL_FILE).is_file():
        copy_file(own.folder.parent / SMALL_FILE, task.path / SMALL_FILE)
    write_json(task.path / SETTINGS_FILE, asdict(task.model.settings))
    ModelFolder.open(task.path)


def _write_official(task: ConversionTask) -> None:
    model, weights = task.model, task.weights
    save_weights(task.path, OFFICIAL_STEM, weights[TRANSFORMER], options=task.options)
    write_json(task.path / "config.json", diffusers_json.official_json(model.transformer_config))
    if VAE in weights:
        config = model.vae_config
        if (config.latents_mean, config.latents_std) != (WAN22_LATENTS_MEAN, WAN22_LATENTS_STD):
            write_json(task.path / VAE_CONFIG_FILE, config.to_dict())
        table = names.autoencoder_official(config.num_res_blocks)
        task.write_pickle(OFFICIAL_VAE, weights[VAE].renamed(table.theirs))
    if TEXT_ENCODER in weights:
        task.write_pickle(OFFICIAL_TEXT_ENCODER, weights[TEXT_ENCODER].renamed(names.TEXT_ENCODER_OFFICIAL.theirs))
        task.copy_tokenizer(OFFICIAL_TOKENIZER)


def _write_longlive(task: ConversionTask) -> None:
    own = longlive_packed.to_longlive(task.weights[TRANSFORMER]).renamed(lambda name: f"{names.MODEL_PREFIX}{name}")
    pickle_file.write_weights(task.path, own, within=("generator",), on_bytes=task.options.on_bytes)


def _write_safetensors(task: ConversionTask) -> None:
    own = task.weights[TRANSFORMER]
    header = {"format": "pt", **packed.header_metadata(own)}
    safetensors_file.write_weights(task.path, own, metadata=header, on_bytes=task.options.on_bytes)


def _write_modelopt(task: ConversionTask) -> None:
    own = scaled.to_modelopt(task.weights[TRANSFORMER])
    _write_diffusers(replace(task, weights={**task.weights, TRANSFORMER: own}))
    linears = [name for name, layer in task.model.build(TRANSFORMER).named_modules() if isinstance(layer, nn.Linear)]
    kept = [f"{name}.weight" for name in linears if f"{name}.{scaled.SCALE}" not in own.infos]
    ignored = [names.to_diffusers(name).removesuffix(".weight") for name in kept]
    folder = task.path / TRANSFORMER
    algorithm = diffusers_json.MODELOPT_FP8 if has_fp8_layers(own) else diffusers_json.MODELOPT_NVFP4
    entry = {diffusers_json.QUANTIZATION: diffusers_json.modelopt_json(algorithm, ignored)}
    write_json(folder / "config.json", read_json(folder / "config.json") | entry)
    write_json(folder / "hf_quant_config.json", diffusers_json.modelopt_quantization(algorithm, ignored))
    # other programs do not read it; without it the commands here would take the settings of the 5B
    write_json(task.path / SETTINGS_FILE, asdict(task.model.settings))


def _anything(model: ModelFolder, weights: Mapping[str, Weights]) -> None:
    pass


def _needs_transformer(model: ModelFolder, weights: Mapping[str, Weights]) -> None:
    if TRANSFORMER not in weights:
        raise CheckpointError(f"{model.path} has no transformer, which this format stores; use a model that has one")


def _not_packed(model: ModelFolder, weights: Mapping[str, Weights]) -> None:
    if TRANSFORMER in weights and packed.is_packed(weights[TRANSFORMER]):
        raise CheckpointError(
            f"{model.path} has packed 4-bit weights, which this format cannot store; add --precision bf16, or convert"
            " the model that they were made from"
        )


def _unpacked_transformer(model: ModelFolder, weights: Mapping[str, Weights]) -> None:
    _needs_transformer(model, weights)
    _not_packed(model, weights)


def _quantized_transformer(model: ModelFolder, weights: Mapping[str, Weights]) -> None:
    _needs_transformer(model, weights)
    if not packed.is_packed(weights[TRANSFORMER]) and not has_fp8_layers(weights[TRANSFORMER]):
        raise CheckpointError(
            f"{model.path} has no weights in 4 or 8 bits, which this format stores; add --precision nvfp4 or fp8"
        )


TARGETS: dict[TargetName, TargetFormat] = {
    "longvideo": TargetFormat(PARTS, (), _anything, _write_longvideo),
    "diffusers": TargetFormat(PARTS, (), _not_packed, _write_diffusers),
    "official": TargetFormat(PARTS, (), _unpacked_transformer, _write_official),
    "longlive": TargetFormat((TRANSFORMER,), (".pt", ".pth"), _needs_transformer, _write_longlive),
    "safetensors": TargetFormat((TRANSFORMER,), (".safetensors",), _needs_transformer, _write_safetensors),
    "modelopt": TargetFormat(PARTS, (), _quantized_transformer, _write_modelopt),
}
