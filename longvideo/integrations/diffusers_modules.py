"""Read the modules of a diffusers pipeline as a model folder: their weights, with LoRA added, and configurations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from longvideo.checkpoint import names
from longvideo.checkpoint.adapter_files import is_adapter
from longvideo.checkpoint.diffusers_folder import SETTINGS_FILE, official_transformer, read_settings
from longvideo.checkpoint.diffusers_json import transformer_config
from longvideo.checkpoint.folder import ModelFolder
from longvideo.checkpoint.modules import own_tensors
from longvideo.checkpoint.parts import TEXT_ENCODER, TRANSFORMER, VAE, ModelPart
from longvideo.checkpoint.settings import ModelSettings
from longvideo.checkpoint.stored_tokenizer import TokenizerFolder
from longvideo.checkpoint.tensors import InMemory, Weights
from longvideo.checkpoint.updates import LowRank, StoredAdapter
from longvideo.errors import UserError
from longvideo.text.umt5 import UMT5Config
from longvideo.vae.config import AutoencoderConfig

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

BASE_LAYER = ".base_layer"
"""Name that peft inserts for the layer that an adapter updates."""
UPDATE = ".lora_"
"""Part of the name of every tensor of an adapter."""


def stored_settings(folder: Path) -> ModelSettings:
    """Return the settings in a folder's longvideo.json; of a folder without one, those of Wan2.2-TI2V-5B."""
    file = folder / SETTINGS_FILE
    return read_settings(file).settings if file.is_file() else ModelSettings()


def model_folder(
    transformer: Any, vae: Any, text_encoder: Any, *, tokenizer: Path, settings: ModelSettings
) -> ModelFolder:
    """Return a model folder in memory, which shares the tensors of the modules.

    transformer, vae, text_encoder: WanTransformer3DModel, AutoencoderKLWan and UMT5EncoderModel. LoRA that diffusers
    loaded into the transformer is added to its weights in float32. tokenizer: folder with tokenizer.json.
    Raises UserError for modules that cannot be read, and CheckpointError for sizes that do not fit each other.
    """
    for part, module in ((TRANSFORMER, transformer), (VAE, vae), (TEXT_ENCODER, text_encoder)):
        if any(tensor.is_meta for tensor in module.state_dict().values()):
            raise UserError(f"the weights of the {part} are offloaded; load the pipeline again and move it with .to()")
    config = {**transformer.config, "patch_size": list(transformer.config.patch_size)}
    tensors = own_tensors(transformer)
    weights = official_transformer(
        Weights.of({name.replace(BASE_LAYER, ""): x for name, x in tensors.items() if UPDATE not in name})
    )
    parts = {
        TRANSFORMER: ModelPart(
            type(transformer).__name__, weights, transformer_config(config, text_len=settings.text_len)
        ),
        VAE: _part(vae, AutoencoderConfig.from_dict(dict(vae.config))),
        TEXT_ENCODER: _part(text_encoder, UMT5Config.from_dict(text_encoder.config.to_dict())),
    }
    folder = ModelFolder(tokenizer.parent, "diffusers pipeline", settings, parts, TokenizerFolder(tokenizer))
    return folder.with_adapters(active_adapters(transformer))


def active_adapters(transformer: nn.Module) -> list[StoredAdapter]:
    """Return the LoRA adapters that are active in a transformer of diffusers, with the scales that peft gives them.

    Adapters that are fused into the weights are not among them. Raises UserError for adapters with DoRA or a bias.
    """
    updates: dict[str, dict[str, list[LowRank]]] = {}
    for name, layer in _adapted_layers(transformer).items():
        active = [one for one in layer.active_adapters if one in layer.lora_A and one not in layer.merged_adapters]
        for adapter in () if layer.disable_adapters else active:
            down, up = layer.lora_A[adapter], layer.lora_B[adapter]
            if up.bias is not None or layer.use_dora.get(adapter):
                raise UserError(
                    f"the adapter {adapter!r} has DoRA or a bias for {name}; call fuse_lora, then unload_lora_weights"
                )
            update = LowRank(InMemory(down.weight), InMemory(up.weight), layer.scaling[adapter])
            updates.setdefault(adapter, {})[names.to_official(f"{name}.weight")] = [update]
    return [StoredAdapter(adapter, own) for adapter, own in updates.items()]


def state_of(*modules: nn.Module) -> Hashable:
    """Return a value that changes when a module gets other weights, another device or data type, or other adapters."""
    tensors = [
        (name, tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, tensor.device, tensor.dtype)
        for module in modules
        for name, tensor in module.state_dict(keep_vars=True).items()
    ]
    adapters = [
        (name, tuple(layer.active_adapters), tuple(layer.merged_adapters), layer.disable_adapters, *scaling)
        for module in modules
        for name, layer in _adapted_layers(module).items()
        for scaling in [tuple(layer.scaling.items())]
    ]
    return tuple(tensors), tuple(adapters)


def _adapted_layers(module: nn.Module) -> Mapping[str, Any]:
    """Return the layers of a module that peft has replaced, by name."""
    if not is_adapter(module.state_dict()):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}


def _part(module: nn.Module, config: AutoencoderConfig | UMT5Config) -> ModelPart:
    return ModelPart(type(module).__name__, Weights.of(own_tensors(module)), config)
