"""Names of the formats and precisions in which models are written; the command line shows them without torch."""

from __future__ import annotations

from typing import Literal

TargetName = Literal["longvideo", "diffusers", "official", "longlive", "safetensors"]
"""A format that a model is converted to."""

StoredPrecision = Literal["bf16", "fp32", "nvfp4"]
"""Precision in which a transformer is stored."""
