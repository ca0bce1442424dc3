"""Layers in FP8 are near the exact model, have no gradient, and are refused where they cannot run."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from longvideo.checkpoint.folder import ModelFolder
from longvideo.config.loading import load_config
from longvideo.distill.config import BackboneConfig
from longvideo.errors import ConfigError, UserError
from longvideo.infer.fit.formats import check_hardware
from longvideo.infer.fit.placement import Placement
from longvideo.kernels.backends import TransformerPrecision
from longvideo.kernels.fp8 import reference, scaled_mm
from longvideo.model.transformer import CausalTransformer
from longvideo.quantization.convert import quantize_layers, with_precision
from longvideo.quantization.fp8 import FP8Linear, quantize_layers_fp8
from longvideo.quantization.number_formats import NumberFormats
from tests.golden import relative_error
from tests.quantization import small

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def linear(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(48, 32, bias=bias, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_is_near_the_exact_one_and_keeps_its_dtype(bias: bool, dtype: torch.dtype) -> None:
    exact = linear(dtype, bias=bias)
    layer, x = FP8Linear.from_linear(exact), torch.randn(2, 5, 48, dtype=dtype)
    got = layer(x)
    assert got.dtype == dtype and relative_error(got.float(), exact(x).float()) < 0.05
    rounded = layer(reference.quantize_rows(x))
    assert rounded.dtype == (dtype if bias else torch.bfloat16)
    assert torch.equal(rounded, got.to(rounded.dtype))
    assert {name: part.dtype for name, part in layer.state_dict().items() if name != "bias"} == {
        "weight_values": torch.float8_e4m3fn,
        "weight_scales": torch.float32,
    }
    assert not list(layer.parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(bad: float) -> None:
    broken = linear()
    broken.weight[3, 4] = bad
    with pytest.raises(ValueError, match=r"blocks.1.ffn.0.weight \[32, 48\] holds NaN or infinity"):
        FP8Linear.from_linear(broken, name="blocks.1.ffn.0.weight")


def test_a_gradient_is_refused_where_it_would_be_lost() -> None:
    layer, x = FP8Linear.from_linear(linear()), torch.randn(2, 48, requires_grad=True)
    with pytest.raises(RuntimeError, match="an FP8 layer has no gradient"):
        layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x.detach()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_velocity_is_near_the_exact_one(dtype: torch.dtype) -> None:
    model = small.model().to(dtype)
    exact = small.velocity(model)
    names = quantize_layers_fp8(model)
    assert len(names) == 10 * small.CONFIG.num_layers
    assert all(isinstance(model.get_submodule(name), FP8Linear) for name in names)
    assert not any(isinstance(module, torch.nn.Linear) for module in model.blocks.modules())
    assert 0.005 < relative_error(small.velocity(model), exact) < 0.05


def test_sizes_that_16_does_not_divide_are_refused_before_anything_is_replaced() -> None:
    model = CausalTransformer(dataclasses.replace(small.CONFIG, ffn_dim=40))
    with pytest.raises(UserError, match="blocks.0.ffn.0 has 32 inputs and 40 outputs; expected multiples of 16"):
        quantize_layers_fp8(model)
    assert not any(isinstance(module, FP8Linear) for module in model.modules())


def test_tiny_runs_in_fp8_on_a_cpu() -> None:
    exact = ModelFolder.open("tiny").load_transformer(dtype=torch.float32)
    held = sum(part.numel() * part.element_size() for part in exact.blocks.parameters())
    model = with_precision(exact, "fp8-emulated")
    kept = sum(part.numel() * part.element_size() for part in (*model.blocks.parameters(), *model.blocks.buffers()))
    assert kept < 0.27 * held
    layer = model.get_submodule("blocks.0.ffn.0")
    assert isinstance(layer, FP8Linear)
    assert layer(torch.randn(3, layer.in_features)).isfinite().all()


def test_a_packed_model_is_refused() -> None:
    packed = small.model()
    quantize_layers(packed)
    with pytest.raises(UserError, match="blocks.0.self_attn.q is packed in 4 bits; expected unpacked"):
        with_precision(packed, "fp8-emulated", packed=True)


def test_a_cpu_runs_fp8_only_under_the_name_of_its_emulation() -> None:
    with pytest.raises(UserError, match="FP8 products need a GPU of compute capability 8.9 or newer, got device 'cpu'"):
        with_precision(small.model(), "fp8")
    for formats in (NumberFormats("fp8"), NumberFormats(attention="fp8"), NumberFormats(decoder="fp8")):
        with pytest.raises(UserError, match="need.* a .*GPU"):
            check_hardware(formats, Placement(CPU, CPU))
    check_hardware(NumberFormats("fp8-emulated", attention="fp8-emulated"), Placement(CPU, CPU))
    with pytest.raises(UserError, match="fp8-emulated is for CPUs, got device 'cuda'; use fp8"):
        check_hardware(NumberFormats("fp8-emulated"), Placement(CUDA, CUDA))


def test_a_gpu_without_fp8_units_is_refused_before_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", None, raising=False)
    formats, placement = NumberFormats("fp8"), Placement(CUDA, CUDA)
    with pytest.raises(
        UserError, match="A100 has compute capability 8.0 < 8.9 .* use --precision bf16 or nvfp4-weights"
    ):
        check_hardware(formats, placement)
    with pytest.raises(UserError, match="A100 has compute capability 8.0 < 8.9 .* use --decoder-precision bf16"):
        check_hardware(NumberFormats(decoder="fp8"), placement)


def test_fp8_is_for_generating_only() -> None:
    with pytest.raises(ConfigError, match="precision is 'fp8'; expected one of 'bf16', 'nvfp4', 'nvfp4-weights'"):
        load_config(BackboneConfig, overrides=["precision=fp8"])


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < scaled_mm.WITH_FP8_UNITS,
    reason="needs a GPU of compute capability 8.9 or newer",
)
def test_velocity_on_a_gpu_is_that_of_the_cpu() -> None:
    cases: dict[str, TransformerPrecision] = {"cuda": "fp8", "cpu": "fp8-emulated"}
    on_cuda, on_cpu = (
        small.velocity(with_precision(small.model().bfloat16().to(device), precision)).cpu()
        for device, precision in cases.items()
    )
    # inputs that differ in their last bit may be rounded to another E4M3 number
    assert relative_error(on_cuda, on_cpu) < 0.05
