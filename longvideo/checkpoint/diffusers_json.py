"""The JSON files of diffusers' folder layout and of Wan's own, as this project's configurations and back."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from longvideo.errors import CheckpointError
from longvideo.flow.schedule import NUM_TRAIN_TIMESTEPS
from longvideo.model.config import TransformerConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from longvideo.checkpoint.settings import ModelSettings

TRANSFORMER_CLASS = "WanTransformer3DModel"
# what the class can be configured to and our transformer is not
TRANSFORMER_FORM = {
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}
# longest side of the table of positions that diffusers makes; ours are computed, so it is not read
ROPE_TABLE = "rope_max_seq_len"
# tells diffusers that it cannot read packed weights; ours say themselves what they are
QUANTIZATION = "quantization_config"
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
    given = {key: value for key, value in values.items() if not key.startswith("_") and key not in NOT_READ}
    for key, wanted in TRANSFORMER_FORM.items():
        if given.pop(key, wanted) != wanted:
            raise CheckpointError(f"{key}={values[key]!r} is not supported, wanted {wanted!r}")
    own = [field for field in fields(TransformerConfig) if field.name != "text_len"]
    if unknown := sorted(given.keys() - {field.name for field in own}):
        raise CheckpointError(f"unknown keys {unknown}; known are {[field.name for field in own]}")
    if missing := sorted({field.name for field in own if field.default is MISSING} - given.keys()):
        raise CheckpointError(f"the keys {missing} are missing")
    patch_size = given.pop("patch_size", [1, 2, 2])
    if not (isinstance(patch_size, list) and len(patch_size) == 3 and all(_is_count(size) for size in patch_size)):
        raise CheckpointError(f"patch_size={patch_size!r}, wanted three whole numbers")
    for key, value in given.items():
        if key != "eps" and not _is_count(value):
            raise CheckpointError(f"{key}={value!r}, wanted a whole number of at least 1")
    if not isinstance(given.get("eps", 0.0), int | float):
        raise CheckpointError(f"eps={given['eps']!r}, wanted a number")
    return TransformerConfig(**given, patch_size=(patch_size[0], patch_size[1], patch_size[2]), text_len=text_len)


def transformer_json(config: TransformerConfig) -> dict[str, Any]:
    """Write the config.json that diffusers' WanTransformer3DModel.from_pretrained reads."""
    values = {field.name: getattr(config, field.name) for field in fields(config) if field.name != "text_len"}
    return {"_class_name": TRANSFORMER_CLASS, **values, "patch_size": list(config.patch_size), **TRANSFORMER_FORM}


def official_config(values: Mapping[str, Any]) -> TransformerConfig:
    """Read the config.json of Wan's official folder. Raises CheckpointError for a missing or unsupported key."""
    if missing := sorted(OFFICIAL_KEYS.keys() - values.keys()):
        raise CheckpointError(f"the keys {missing} are missing")
    if (model_type := values.get("model_type", "ti2v")) not in OFFICIAL_TYPES:
        raise CheckpointError(f"model_type={model_type!r} is not supported, wanted one of {', '.join(OFFICIAL_TYPES)}")
    for key in OFFICIAL_KEYS:
        if not _is_count(values[key]):
            raise CheckpointError(f"{key}={values[key]!r}, wanted a whole number of at least 1")
    given = {ours: values[theirs] for theirs, ours in OFFICIAL_KEYS.items()}
    heads, dim = values["num_heads"], values["dim"]
    if dim % heads:
        raise CheckpointError(f"dim={dim} does not divide into num_heads={heads}")
    eps = values.get("eps", 1e-6)
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise CheckpointError(f"eps={eps!r}, wanted a number")
    return TransformerConfig(**{**given, "attention_head_dim": dim // heads}, text_dim=OFFICIAL_TEXT_DIM, eps=eps)


def official_json(config: TransformerConfig) -> dict[str, Any]:
    """Write the config.json that Wan's own WanModel reads; it has no place for the width of text features."""
    values = {theirs: getattr(config, ours) for theirs, ours in OFFICIAL_KEYS.items() if ours != "attention_head_dim"}
    return {"_class_name": OFFICIAL_CLASS, "model_type": "ti2v", **values, "dim": config.dim, "eps": config.eps}


def scheduler_json(settings: ModelSettings) -> dict[str, Any]:
    """Write the config of the solver by which diffusers' WanPipeline samples the same flow."""
    return {
        "_class_name": "UniPCMultistepScheduler",
        "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": settings.shift,
        "solver_order": 2,
    }


def model_index(parts: tuple[str, ...]) -> dict[str, Any]:
    """Write model_index.json for a folder holding these parts."""
    return {
        "_class_name": "WanPipeline",
        "expand_timesteps": True,
        "boundary_ratio": None,
        **{part: list(PART_CLASSES[part]) for part in sorted(parts)},
        "transformer_2": [None, None],
    }


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
