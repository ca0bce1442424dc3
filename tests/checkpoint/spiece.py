"""The SentencePiece model of the fixtures as a tensor, as ComfyUI's files of a text encoder have theirs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

FIXTURES = Path(__file__).parents[1] / "fixtures"


def spiece_model() -> Tensor:
    return torch.tensor(list((FIXTURES / "spiece_a.model").read_bytes()), dtype=torch.uint8)
