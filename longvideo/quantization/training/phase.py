"""Phases of a training in low precision."""

from __future__ import annotations

from enum import Enum


class TrainingPhase(Enum):
    """Which passes of a step have products in low precision: both, the backward pass alone, or neither."""

    BOTH = "both"
    BACKWARD = "backward"
    NEITHER = "neither"
