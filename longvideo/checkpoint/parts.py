"""What was found on disk: the parts of a model, each with its weights under our names and what they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from longvideo.checkpoint.adapters import StoredAdapter
from longvideo.checkpoint.settings import ModelSettings
from longvideo.checkpoint.tensors import Weights
from longvideo.model.config import TransformerConfig
from longvideo.text.umt5 import UMT5Config
from longvideo.vae.config import AutoencoderConfig

TRANSFORMER, VAE, TEXT_ENCODER = PARTS = ("transformer", "vae", "text_encoder")
PartConfig: TypeAlias = TransformerConfig | AutoencoderConfig | UMT5Config


@dataclass(frozen=True)
class ModelPart:
    """A part of a model. kind: the class its files say they are of, or whose names they have."""

    kind: str
    weights: Weights
    config: PartConfig


@dataclass(frozen=True)
class Found:
    """What a path holds.

    settings: None where the files say nothing of them. tokenizer: folder with tokenizer.json. notes: numbers and texts
    beside the weights, such as the step they are of. unused: files that are of no part, and why.
    """

    format: str
    parts: Mapping[str, ModelPart]
    settings: ModelSettings | None = None
    tokenizer: Path | None = None
    adapter: StoredAdapter | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    unused: Mapping[Path, str] = field(default_factory=dict)
