"""Text encoders with weights in 8 and 4 bits: the results are those of the dequantized weights, and the sizes true."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longvideo.checkpoint.folder import ModelFolder
from longvideo.infer.fit.placement import Placement
from longvideo.infer.text_encoder import load_text_encoder
from longvideo.kernels.fp8 import reference as fp8
from longvideo.kernels.nvfp4 import reference as nvfp4
from longvideo.quantization.linear import NVFP4Linear
from longvideo.quantization.number_formats import NumberFormats
from longvideo.quantization.weights_only import (
    FP8Embedding,
    FP8WeightLinear,
    WeightPrecision,
    quantize_weights,
    quantized_bytes,
)
from longvideo.text.umt5 import POSITION_BIASES, UMT5Config, UMT5Encoder

CPU = torch.device("cpu")
PROMPTS = ("a red ball bounces on grass", "a large blue star spins at night")


def umt5(dtype: torch.dtype = torch.float32) -> UMT5Encoder:
    model = UMT5Encoder(UMT5Config(vocab_size=50, d_model=48, d_kv=8, d_ff=64, num_layers=2, num_heads=4))
    model.initialize(torch.Generator().manual_seed(3))
    return model.to(dtype).eval().requires_grad_(False)


def tensors(module: nn.Module) -> Iterator[Tensor]:
    seen = {id(x): x for x in [*module.parameters(), *module.buffers()]}
    yield from seen.values()


def rounded_rows(weight: Tensor) -> Tensor:
    """Return a weight with each row rounded to E4M3, so that its largest magnitude is 448 times the row's scale."""
    rows = fp8.quantize_rows(weight)
    return rows.values.float() * rows.scales.unsqueeze(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["fp8", "nvfp4"])
def test_products_are_those_of_the_dequantized_weights(precision: WeightPrecision, dtype: torch.dtype) -> None:
    model, original = umt5(dtype), umt5(dtype)
    quantize_weights(model, precision, CPU, keep=POSITION_BIASES)
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = original.get_submodule("encoder.block.1.layer.1.DenseReluDense.wi_0")
    layer = model.get_submodule("encoder.block.1.layer.1.DenseReluDense.wi_0")
    assert isinstance(before, nn.Linear)
    if precision == "fp8":
        assert isinstance(layer, FP8WeightLinear)
        weight = rounded_rows(before.weight.float())
    else:
        assert isinstance(layer, NVFP4Linear)
        weight = nvfp4.dequantize(nvfp4.quantize(before.weight), torch.float32)
    assert torch.allclose(layer(x), F.linear(x, weight.to(dtype)), atol=1e-6)
    error = (weight - before.weight.float()).norm() / before.weight.float().norm()
    assert 0.001 < error < (0.03 if precision == "fp8" else 0.11)
    assert isinstance(model.shared, FP8Embedding) and model.encoder.embed_tokens is model.shared
    rows = model.shared(torch.tensor([[4, 7]]))
    assert rows.dtype == dtype
    assert torch.allclose(rows[0, 1], rounded_rows(original.shared.weight.float())[7].to(dtype), rtol=1e-2, atol=1e-6)
    biases = [layer for name, layer in model.named_modules() if name.endswith(POSITION_BIASES)]
    assert len(biases) == 2 and all(isinstance(layer, nn.Embedding) for layer in biases)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["fp8", "nvfp4"])
def test_the_size_is_that_of_the_tensors(precision: WeightPrecision, dtype: torch.dtype) -> None:
    model = umt5(dtype)
    expected = quantized_bytes(model, precision, dtype, keep=POSITION_BIASES)
    quantize_weights(model, precision, CPU, keep=POSITION_BIASES)
    size = sum(x.numel() * x.element_size() for x in tensors(model))
    scales = 4 * sum(isinstance(layer, NVFP4Linear) for layer in model.modules())  # a number for each packed layer
    assert size == expected + scales


def test_inputs_that_are_no_multiple_of_16_stay_in_8_bits() -> None:
    model = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 8))
    quantize_weights(model, "nvfp4", CPU)
    assert isinstance(model[0], FP8WeightLinear) and isinstance(model[1], NVFP4Linear)


def test_nan_is_named() -> None:
    model = umt5()
    model.shared.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"shared.weight \[50, 48\] holds NaN or infinity"):
        quantize_weights(model, "fp8", CPU)


@pytest.mark.parametrize(("precision", "bound"), [("fp8", 0.2), ("nvfp4", 0.5)])
def test_features_of_random_weights_with_the_depth_of_umt5_xxl_change_little(
    precision: WeightPrecision, bound: float
) -> None:
    xxl = UMT5Config.xxl()
    config = replace(xxl, vocab_size=1000, d_model=256, d_ff=256 * xxl.d_ff // xxl.d_model, num_heads=4)
    model = UMT5Encoder(config).eval().requires_grad_(False)
    model.initialize(torch.Generator().manual_seed(0))
    ids = torch.randint(2, 1000, (4, 64), generator=torch.Generator().manual_seed(1))
    expected = model(ids, torch.ones_like(ids))
    quantize_weights(model, precision, CPU, keep=POSITION_BIASES)
    features = model(ids, torch.ones_like(ids))
    error = ((features - expected).norm() / expected.norm()).item()
    print(f"relative error of features of random weights in {precision}: {error:.4f}")
    assert 0.001 < error < bound


@pytest.mark.parametrize(("precision", "bound"), [("fp8", 0.06), ("nvfp4", 0.2)])
def test_features_of_tiny_change_little(precision: WeightPrecision, bound: float) -> None:
    folder, placement = ModelFolder.open("tiny"), Placement.choose("cpu", dtype=torch.float32)
    expected, features = (
        load_text_encoder(folder, placement, NumberFormats(text_encoder=form)).encode(PROMPTS)[0]
        for form in ("bf16", precision)
    )
    error = ((features - expected).norm() / expected.norm()).item()
    print(f"relative error of tiny's features with weights in {precision}: {error:.4f}")
    assert 0.001 < error < bound
