"""Conversion between this project's configurations and the JSON files of diffusers' and Wan's folders."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from longvideo.errors import CheckpointError
from longvideo.flow.schedule import NUM_TRAIN_TIMESTEPS
from longvideo.kernels.nvfp4.format import GROUP
from longvideo.model.config import TransformerConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from longvideo.checkpoint.settings import ModelSettings

TRANSFORMER_CLASS = "WanTransformer3DModel"
# options of the class for which this project's transformer has one fixed value
TRANSFORMER_FORM = {
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}
# longest side of diffusers' table of positions; this project computes positions, so it is not read
ROPE_TABLE = "rope_max_seq_len"
# makes diffusers refuse packed weights; this project reads their convention from the weight file
QUANTIZATION = "quantization_config"
MODELOPT, MODELOPT_NVFP4, MODELOPT_FP8 = "modelopt", "W4A16_NVFP4", "FP8_PER_CHANNEL_PER_TOKEN"
"""NVIDIA ModelOpt's names of itself, of 4-bit weights without stored scales of inputs, and of FP8 weights with a scale
for each row whose inputs are scaled token by token."""
MODELOPT_LAYERS = {
    MODELOPT_NVFP4: {"weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": GROUP}},
    MODELOPT_FP8: {
        "weights": {"dynamic": False, "num_bits": 8, "type": "float", "strategy": "channel"},
        "input_activations": {"dynamic": True, "num_bits": 8, "type": "float", "strategy": "token"},
    },
}
NOT_READ = (ROPE_TABLE, QUANTIZATION)
OFFICIAL_CLASS = "WanModel"
OFFICIAL_TYPES = ("ti2v", "t2v")
OFFICIAL_TEXT_DIM = 4096
OFFICIAL_KEYS = {
    "dim": "attention_head_dim",  # times num_heads
    "num_heads": "num_attention_heads",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "num_layers": "num_layers",
    "text_len": "text_len",
}
PART_CLASSES = {
    "scheduler": ("diffusers", "UniPCMultistepScheduler"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "tokenizer": ("transformers", "PreTrainedTokenizerFast"),
    "transformer": ("diffusers", TRANSFORMER_CLASS),
    "vae": ("diffusers", "AutoencoderKLWan"),
}


def transformer_config(values: Mapping[str, Any], *, text_len: int) -> TransformerConfig:
    """Read transformer/config.json. Raises CheckpointError for a missing, unknown or unsupported key."""
    config = {key: value for key, value in values.items() if not key.startswith("_") and key not in NOT_READ}
    for key, expected in TRANSFORMER_FORM.items():
        if config.pop(key, expected) != expected:
            raise CheckpointError(f"{key}={values[key]!r} is not supported; expected {expected!r}")
    own = [field for field in fields(TransformerConfig) if field.name != "text_len"]
    if unknown := sorted(config.keys() - {field.name for field in own}):
        raise CheckpointError(f"the keys {unknown} are unknown; expected {[field.name for field in own]}")
    if missing := sorted({field.name for field in own if field.default is MISSING} - config.keys()):
        raise CheckpointError(f"the keys {missing} are missing")
    patch_size = config.pop("patch_size", [1, 2, 2])
    if not (isinstance(patch_size, list) and len(patch_size) == 3 and all(_is_count(size) for size in patch_size)):
        raise CheckpointError(f"patch_size={patch_size!r}, expected three whole numbers")
    for key, value in config.items():
        if key != "eps" and not _is_count(value):
            raise CheckpointError(f"{key}={value!r}, expected a whole number of at least 1")
    if not isinstance(config.get("eps", 0.0), int | float):
        raise CheckpointError(f"eps={config['eps']!r}, expected a number")
    return TransformerConfig(**config, patch_size=(patch_size[0], patch_size[1], patch_size[2]), text_len=text_len)


def transformer_json(config: TransformerConfig) -> dict[str, Any]:
    """Return the config.json that diffusers' WanTransformer3DModel.from_pretrained reads."""
    values = {field.name: getattr(config, field.name) for field in fields(config) if field.name != "text_len"}
    return {"_class_name": TRANSFORMER_CLASS, **values, "patch_size": list(config.patch_size), **TRANSFORMER_FORM}


def official_config(values: Mapping[str, Any]) -> TransformerConfig:
    """Read the config.json of Wan's official folder. Raises CheckpointError for a missing or unsupported key."""
    if missing := sorted(OFFICIAL_KEYS.keys() - values.keys()):
        raise CheckpointError(f"the keys {missing} are missing")
    if (model_type := values.get("model_type", "ti2v")) not in OFFICIAL_TYPES:
        raise CheckpointError(f"model_type={model_type!r} is not supported; expected {' or '.join(OFFICIAL_TYPES)}")
    for key in OFFICIAL_KEYS:
        if not _is_count(values[key]):
            raise CheckpointError(f"{key}={values[key]!r}, expected a whole number of at least 1")
    config = {ours: values[theirs] for theirs, ours in OFFICIAL_KEYS.items()}
    heads, dim = values["num_heads"], values["dim"]
    if dim % heads:
        raise CheckpointError(f"dim={dim} is not a multiple of num_heads={heads}")
    eps = values.get("eps", 1e-6)
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise CheckpointError(f"eps={eps!r}, expected a number")
    return TransformerConfig(**{**config, "attention_head_dim": dim // heads}, text_dim=OFFICIAL_TEXT_DIM, eps=eps)


def official_json(config: TransformerConfig) -> dict[str, Any]:
    """Return the config.json that Wan's own WanModel reads; it cannot store the width of text features."""
    values = {theirs: getattr(config, ours) for theirs, ours in OFFICIAL_KEYS.items() if ours != "attention_head_dim"}
    return {"_class_name": OFFICIAL_CLASS, "model_type": "ti2v", **values, "dim": config.dim, "eps": config.eps}


def modelopt_json(algorithm: str, ignored: list[str]) -> dict[str, Any]:
    """Return the entry of config.json that describes quantized weights as NVIDIA ModelOpt does.

    algorithm: a key of MODELOPT_LAYERS. ignored: linear layers that are not quantized.
    """
    return {
        "quant_method": MODELOPT,
        "quant_algo": algorithm,
        "config_groups": {"group_0": {**MODELOPT_LAYERS[algorithm], "targets": ["Linear"]}},
        "ignore": ignored,
    }


def modelopt_quantization(algorithm: str, ignored: list[str]) -> dict[str, Any]:
    """Return hf_quant_config.json of NVIDIA ModelOpt; arguments as of `modelopt_json`."""
    quantization: dict[str, Any] = {"quant_algo": algorithm, "kv_cache_quant_algo": None}
    if algorithm == MODELOPT_NVFP4:
        quantization["group_size"] = GROUP
    return {"producer": {"name": "longvideo"}, "quantization": {**quantization, "exclude_modules": ignored}}


def scheduler_json(settings: ModelSettings) -> dict[str, Any]:
    """Return the configuration of the solver with which diffusers' WanPipeline samples the same flow."""
    return {
        "_class_name": "UniPCMultistepScheduler",
        "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": settings.shift,
        "solver_order": 2,
    }


def model_index(parts: tuple[str, ...]) -> dict[str, Any]:
    """Return model_index.json for a folder with these parts."""
    return {
        "_class_name": "WanPipeline",
        "expand_timesteps": True,
        "boundary_ratio": None,
        **{part: list(PART_CLASSES[part]) for part in sorted(parts)},
        "transformer_2": [None, None],
    }


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
