"""The contents of a model on disk: its parts, each with a configuration and weights under this project's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

from longvideo.checkpoint.settings import PRESETS, ModelSettings
from longvideo.checkpoint.stored_tokenizer import StoredTokenizer
from longvideo.checkpoint.tensors import Weights
from longvideo.checkpoint.updates import StoredAdapter
from longvideo.errors import ConfigError
from longvideo.model.config import TransformerConfig
from longvideo.text.umt5 import UMT5Config
from longvideo.vae.config import AutoencoderConfig

TRANSFORMER, VAE, TEXT_ENCODER = PARTS = ("transformer", "vae", "text_encoder")
PartConfig: TypeAlias = TransformerConfig | AutoencoderConfig | UMT5Config


@dataclass(frozen=True)
class ModelPart:
    """A part of a model.

    kind: name of the class in the part's files, or of the naming that its tensors follow. folder: folder in diffusers'
    layout whose files contain exactly these weights; None for weights that are read or changed in another way.
    """

    kind: str
    weights: Weights
    config: PartConfig
    folder: Path | None = None

    def with_weights(self, weights: Weights) -> ModelPart:
        """Return the part with other weights."""
        return replace(self, weights=weights, folder=None)


@dataclass(frozen=True)
class StoredModel:
    """The contents of a path.

    settings: None where the files have none. notes: numbers and texts stored with the weights, such as the training
    step. unused: files that belong to no part, with the reason.
    """

    format: str
    parts: Mapping[str, ModelPart]
    settings: ModelSettings | None = None
    tokenizer: StoredTokenizer | None = None
    adapter: StoredAdapter | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    unused: Mapping[Path, str] = field(default_factory=dict)

    def settings_of(self, preset: str | None, *, base: ModelSettings | None) -> ModelSettings:
        """Return the settings of a preset, or else those in the files, those of the base, or those of a new model.

        base: settings of the model with the missing parts. Raises ConfigError for an unknown preset.
        """
        if preset is not None:
            if preset not in PRESETS:
                raise ConfigError(f"preset is {preset!r}; expected one of {', '.join(PRESETS)}")
            return PRESETS[preset]
        if (settings := self.settings or base) is not None:
            return settings
        own = self.parts.get(TRANSFORMER)
        if own is None:
            return ModelSettings()
        assert isinstance(own.config, TransformerConfig)
        return ModelSettings(text_len=own.config.text_len)
