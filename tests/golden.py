"""Inputs, weights and outputs of the reference (small sizes, fp32, CPU), as objects of this project."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from longvideo.model.config import TransformerConfig
from longvideo.model.spec import ChunkSpec
from longvideo.model.transformer import CausalTransformer

FIXTURES = Path(__file__).parent / "fixtures"
TOLERANCE = 1e-5


def load(name: str) -> dict[str, Tensor]:
    return load_file(FIXTURES / f"{name}.safetensors")


def sizes() -> dict:
    return json.loads((FIXTURES / "causal_a.json").read_text())


def spec(*, multi_shot: bool = False) -> ChunkSpec:
    s = sizes()
    return ChunkSpec(
        grid_height=s["h"] // 2,
        grid_width=s["w"] // 2,
        chunk_frames=s["chunk"],
        window_frames=s["window"],
        sink_frames=s["sink"],
        pin_shots=multi_shot,
        offset_per_shot=8 if multi_shot else 0,
    )


def model() -> CausalTransformer:
    s = sizes()
    config = TransformerConfig(
        num_attention_heads=s["num_heads"],
        attention_head_dim=s["dim"] // s["num_heads"],
        in_channels=s["ch"],
        out_channels=s["ch"],
        text_dim=s["text_dim"],
        text_len=s["text_len"],
        ffn_dim=s["ffn_dim"],
        num_layers=s["num_layers"],
        freq_dim=s["freq_dim"],
    )
    transformer = CausalTransformer(config)
    weights = {name.removeprefix("model."): value for name, value in load("causal_a.weights").items()}
    transformer.load_state_dict(weights, strict=True)
    return transformer.eval()


def packed() -> dict[str, Tensor]:
    """Return the model in 4 bits; what is not quantized is stored only once, with its other weights."""
    quantized = load("packed_a")
    layers = {name.removesuffix(".quantized_weight_values") for name in quantized}
    whole = {name: x for name, x in load("causal_a.weights").items() if name.removesuffix(".weight") not in layers}
    return whole | quantized


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()
