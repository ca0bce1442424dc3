"""Layers that train with TransformerEngine: what refuses them, and on a GPU with FP8 or FP4 units their products."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longvideo.checkpoint.folder import ModelFolder
from longvideo.cli.main import main
from longvideo.kernels import te
from longvideo.kernels.fp8 import te as te_fp8
from longvideo.kernels.fp8.reference import quantize_tensor
from longvideo.kernels.nvfp4 import reference
from longvideo.kernels.nvfp4 import te as te_nvfp4
from longvideo.kernels.nvfp4.format import Rule
from longvideo.model.transformer import CausalTransformer
from longvideo.quantization.training.fp8 import FP8Scaling, FP8TrainingLinear, next_step
from longvideo.quantization.training.layers import TrainingLayers, train_in_fp8
from longvideo.quantization.training.phase import TrainingPhase
from longvideo.quantization.training.te_linear import TEDelayedLinear, TETrainingLinear
from tests.checkpoint import small as small_folder
from tests.golden import relative_error
from tests.quantization import small

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
INPUTS, OUTPUTS = 256, 384
BFLOAT16_ERROR = 2.0**-9
"""Largest error of a rounding to bfloat16; the two of a product are at most twice it."""


@pytest.fixture
def fp8_engine() -> None:
    if (reason := te_fp8.unavailable(CUDA)) is not None:
        pytest.skip(reason)


@pytest.fixture
def nvfp4_engine() -> None:
    if (reason := te_nvfp4.unavailable(CUDA)) is not None:
        pytest.skip(reason)


def numbers(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).bfloat16().to(CUDA)


def linear(dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(INPUTS, OUTPUTS).to(CUDA, dtype)


def engine_layer(scaling: FP8Scaling, dtype: torch.dtype = torch.bfloat16) -> TETrainingLinear:
    if scaling is FP8Scaling.DELAYED:
        return TEDelayedLinear(linear(dtype))
    return TETrainingLinear(linear(dtype), te_fp8.current_recipe())


def run(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output and the gradients of the input, the weight and the bias."""
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    output = layer(leaf)
    output.backward(grad)
    gradients = leaf.grad, layer.get_parameter("weight").grad, layer.get_parameter("bias").grad
    assert all(gradient is not None for gradient in gradients)
    return output.detach(), *gradients  # type: ignore[return-value]


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor rounded to FP8 by its own magnitude, by the definition, in float64."""
    result = quantize_tensor(x.float(), x.abs().amax().float(), dtype)
    return result.values.double() * result.scale.double()


def products(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x @ weight.t() + bias, grad @ weight, grad.t() @ x


# everywhere


@pytest.mark.skipif(te.missing_package() is None, reason="TransformerEngine is installed")
def test_a_missing_package_is_named_with_its_extra() -> None:
    reason = te.missing_package()
    assert reason is not None and reason.endswith("pip install 'longvideo[te]'")


@pytest.mark.parametrize("scaling", FP8Scaling)
def test_a_cpu_refuses_the_backend_with_a_reason_and_emulates_by_default(scaling: FP8Scaling) -> None:
    with pytest.raises(ValueError, match=r"the backend te cannot run on cpu: FP8 products need .*; use products.back"):
        train_in_fp8(small.model(), scaling, backend="te")
    trained = train_in_fp8(small.model(), scaling)
    assert trained.description == "emulated (a CPU has no FP8 units)"
    assert all(isinstance(layer, FP8TrainingLinear) for layer in trained.fp8.values())
    assert len(trained.delayed) == (len(trained.fp8) if scaling is FP8Scaling.DELAYED else 0)


def test_a_tail_that_rounds_the_backward_pass_alone_is_the_first_reason() -> None:
    with pytest.raises(
        ValueError, match="TransformerEngine cannot round the backward pass alone; use products.backend"
    ):
        train_in_fp8(small.model(), FP8Scaling.CURRENT, backend="te", backward_alone=True)


def test_sizes_that_are_not_multiples_of_sixteen_are_refused() -> None:
    with pytest.raises(ValueError, match="the layer has 32 inputs and 24 outputs; expected multiples of 16"):
        TETrainingLinear(nn.Linear(32, 24), None)


# products on FP8 units


@pytest.mark.gpu
@pytest.mark.usefixtures("fp8_engine")
@pytest.mark.parametrize("rows", [512, 40])
@pytest.mark.parametrize("scaling", FP8Scaling)
def test_the_three_products_are_those_of_the_definition_in_fp8(scaling: FP8Scaling, rows: int) -> None:
    layer, x, grad = engine_layer(scaling), numbers(rows, INPUTS, seed=1), numbers(rows, OUTPUTS, seed=2, scale=1e-5)
    got = run(layer, x, grad)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    exact = products(x.double(), weight.double(), bias.double(), grad.double())
    by_definition = products(rounded(x, E4M3), rounded(weight, E4M3), bias.double(), rounded(grad, E5M2))
    for name, result, definition, true in zip(("forward", "dgrad", "wgrad"), got, by_definition, exact, strict=False):
        result = result.double()
        # TransformerEngine multiplies by the scale, which may round the other way at a tie
        assert relative_error(result, definition) < 2 * BFLOAT16_ERROR, name
        allowed = relative_error(definition, true)
        assert 0.9 * allowed < relative_error(result, true) < 1.02 * allowed + BFLOAT16_ERROR, name
    torch.testing.assert_close(got[3].double(), grad.double().sum(0), rtol=2e-2, atol=float(got[3].abs().max()) * 1e-2)


@pytest.mark.gpu
@pytest.mark.usefixtures("fp8_engine")
def test_autocast_rounds_inputs_but_not_weights_of_float32() -> None:
    layer, x, grad = engine_layer(FP8Scaling.CURRENT, torch.float32), numbers(64, INPUTS, seed=1), None
    grad = numbers(64, OUTPUTS, seed=2)
    with torch.autocast("cuda", torch.bfloat16):
        output, grad_x, grad_weight, grad_bias = run(layer, x.float(), grad)
    assert output.dtype == torch.bfloat16
    assert {grad_x.dtype, grad_weight.dtype, grad_bias.dtype} == {torch.float32}
    weight = rounded(layer.weight.detach(), E4M3)
    expected = products(rounded(x, E4M3), weight, layer.bias.detach().double(), rounded(grad, E5M2))
    for result, definition in zip((output, grad_x, grad_weight), expected, strict=True):
        assert relative_error(result.double(), definition) < 2 * BFLOAT16_ERROR


@pytest.mark.gpu
@pytest.mark.usefixtures("fp8_engine")
def test_delayed_scaling_keeps_the_histories_of_torchs_layer() -> None:
    own, torchs = TEDelayedLinear(linear()), FP8TrainingLinear.from_linear(linear(), scaling=FP8Scaling.DELAYED)
    grad = numbers(48, OUTPUTS, seed=2)
    for step, factor in enumerate((1.0, 4.0, 0.5, 2.0)):
        for layer in (own, torchs):
            layer.set_amaxes(next_step(layer.amaxes))
        # the second pass is smaller, so that a magnitude that replaced the first would be seen
        for seed, part in ((3, 1.0), (4, 0.25)):
            x = factor * part * numbers(48, INPUTS, seed=seed)
            for result, expected in zip(run(own, x, grad * 2**step), run(torchs, x, grad * 2**step), strict=True):
                assert relative_error(result.double(), expected.double()) < 3 * BFLOAT16_ERROR, (step, seed)
        assert torch.equal(own.amaxes, torchs.amaxes)
    before = own.amaxes.clone()
    with torch.no_grad():
        own(100 * numbers(48, INPUTS, seed=5))
    assert torch.equal(own.amaxes, before)


@pytest.mark.gpu
@pytest.mark.usefixtures("fp8_engine")
@pytest.mark.parametrize("scaling", FP8Scaling)
def test_recomputed_and_compiled_layers_give_the_same_bits(scaling: FP8Scaling) -> None:
    results: list[tuple[Tensor, ...]] = []
    for kind in ("plain", "recomputed", "compiled"):
        layer = engine_layer(scaling)
        if isinstance(layer, TEDelayedLinear):
            run(layer, numbers(64, INPUTS, seed=3), numbers(64, OUTPUTS, seed=4))
            layer.set_amaxes(next_step(layer.amaxes))
        layer.zero_grad()
        leaf = numbers(64, INPUTS, seed=1).requires_grad_()
        if kind == "recomputed":
            output = checkpoint(layer, leaf, use_reentrant=False)
        else:
            output = layer(leaf) if kind == "plain" else torch.compile(layer, backend="aot_eager")(leaf)
        assert isinstance(output, Tensor)
        output.backward(numbers(64, OUTPUTS, seed=2))
        assert leaf.grad is not None and layer.weight.grad is not None
        results.append((output.detach(), leaf.grad, layer.weight.grad))
    for other in results[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(results[0], other, strict=True))


@pytest.mark.gpu
@pytest.mark.usefixtures("fp8_engine")
def test_without_a_phase_the_layer_is_plain() -> None:
    layer, x, grad = engine_layer(FP8Scaling.CURRENT), numbers(64, INPUTS, seed=1), numbers(64, OUTPUTS, seed=2)
    fp8 = run(layer, x, grad)[0]
    layer.phase = TrainingPhase.NEITHER
    assert all(map(torch.equal, run(layer, x, grad), run(linear(), x, grad)))
    layer.phase = TrainingPhase.BOTH
    assert torch.equal(run(layer, x, grad)[0], fp8)


# a transformer


def trained(scaling: FP8Scaling, backend: Any) -> tuple[CausalTransformer, TrainingLayers]:
    model = small.model().to(CUDA)
    return model, train_in_fp8(model, scaling, backend=backend)


@pytest.mark.gpu
@pytest.mark.usefixtures("fp8_engine")
@pytest.mark.parametrize("scaling", FP8Scaling)
def test_a_transformer_keeps_its_names_and_computes_what_torchs_products_do(scaling: FP8Scaling) -> None:
    plain = small.model().to(CUDA)
    parameters = dict(plain.named_parameters())
    exact = small.velocity(plain)
    model, layers = trained(scaling, None)
    assert layers.description == "through TransformerEngine" and len(layers.fp8) == 10 * small.CONFIG.num_layers
    assert model.state_dict().keys() == plain.state_dict().keys() and dict(model.named_parameters()).keys() == {
        *parameters
    }
    for source, target in ((model, plain), (plain, model)):
        target.load_state_dict(source.state_dict())
    results: dict[str, tuple[Tensor, dict[str, Tensor]]] = {}
    for backend in ("te", "torch"):
        model, _ = trained(scaling, backend)
        flow = small.trained_velocity(model)
        flow.square().sum().backward()
        gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        assert gradients.keys() == parameters.keys()
        results[backend] = flow.detach(), gradients
    (flow, gradients), (expected, others) = results["te"], results["torch"]
    error = relative_error(expected, exact)
    assert 1e-3 < error < 0.2 and relative_error(flow, expected) < 0.5 * error
    mine, theirs = (torch.cat([part[name].flatten() for name in sorted(parameters)]) for part in (gradients, others))
    assert relative_error(mine, theirs) < 0.1


@pytest.mark.gpu
@pytest.mark.usefixtures("fp8_engine")
@pytest.mark.parametrize("scaling", FP8Scaling)
def test_adapters_train_on_top_of_its_layers(scaling: FP8Scaling) -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig

    from longvideo.quantization.lora import TARGETS, add_lora

    model, layers = trained(scaling, "te")
    before = small.velocity(model)
    adapted = add_lora(model, LoraConfig(r=4, target_modules=list(TARGETS)))
    weights = {name: value for name, value in adapted.named_parameters() if value.requires_grad}
    assert len(weights) == 2 * len(layers.fp8) and all("lora_" in name for name in weights)
    assert torch.equal(small.velocity(model), before)
    small.trained_velocity(model).square().sum().backward()
    assert all(value.grad is not None for value in weights.values())
    assert all(value.grad is not None and value.grad.norm() > 0 for name, value in weights.items() if "lora_B" in name)
    assert all(layer.get_parameter("weight").grad is None for layer in layers.fp8.values())


# runs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder whose layers have sizes that are multiples of 16, and clips encoded with it."""
    pytest.importorskip("av")
    from tests.data import footage

    folder = tmp_path_factory.mktemp("clips")
    torch.manual_seed(0)
    transformer = CausalTransformer(replace(small_folder.TRANSFORMER, attention_head_dim=16)).eval()
    ModelFolder.save(
        folder / "model",
        settings=small_folder.SETTINGS,
        transformer=transformer,
        vae=small_folder.vae(),
        text_encoder=small_folder.text_encoder(),
    )
    options = ["--chunks", "2", "--device", "cpu", "--workers", "0", "--out", str(folder / "clips")]
    assert main(["data", "encode", str(footage.footage(folder)), "--model", str(folder / "model"), *options]) == 0
    return folder / "model", folder / "clips"


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def run_whole_and_cut(
    data: tuple[Path, Path], folder: Path, *settings: str, device: str, launcher: tuple[str, ...] = ()
) -> tuple[list[float], list[float], str]:
    """Train 4 steps at once, and 2 steps that are then resumed; return the losses of both, and what was printed."""
    model, clips = data
    fixed = ["optimizer.schedule=constant", "optimizer.learning_rate=1e-3", "trainer.save_every=2", *settings]
    fixed += ["objective.checkpoint=true", "objective.compile=false", "products.format=fp8"]
    printed = ""
    for name, steps in (("whole", 4), ("cut", 2), ("cut", 4)):
        stages = f"stages=[{{steps: {steps}, chunks: 2, batch: 2}}]"
        module = [
            *launcher,
            "-m",
            "longvideo",
            "train",
            "clips",
            f"data={clips}",
            f"initialize={model}",
            stages,
            *fixed,
        ]
        command = [sys.executable, *module, "--out", str(folder / name), "--device", device]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        printed += done.stdout + done.stderr
    return losses(folder / "whole"), losses(folder / "cut"), printed


@pytest.mark.slow
def test_an_emulated_run_resumes_bit_for_bit(data: tuple[Path, Path], tmp_path: Path) -> None:
    whole, cut, printed = run_whole_and_cut(data, tmp_path, "products.recipe=delayed", device="cpu")
    assert len(whole) == 4 and whole == cut
    assert "(recipe delayed), emulated (a CPU has no FP8 units)" in printed


ONE_PROCESS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")


@pytest.mark.gpu
@pytest.mark.usefixtures("fp8_engine")
@pytest.mark.parametrize("scaling", FP8Scaling)
@pytest.mark.parametrize("launcher", [(), ONE_PROCESS], ids=["one process", "ZeRO 1"])
def test_a_run_resumes_bit_for_bit(
    data: tuple[Path, Path], tmp_path: Path, scaling: FP8Scaling, launcher: tuple[str, ...]
) -> None:
    settings = [f"products.recipe={scaling.value}", "products.backend=te"]
    if launcher:
        pytest.importorskip("deepspeed")
        settings.append("parallel.zero_stage=1")
    whole, cut, printed = run_whole_and_cut(data, tmp_path, *settings, device="cuda", launcher=launcher)
    assert len(whole) == 4 and whole == cut
    assert f"(recipe {scaling.value}), through TransformerEngine" in printed


# products on FP4 units


@pytest.mark.sm100
@pytest.mark.usefixtures("nvfp4_engine")
@pytest.mark.parametrize(("rule", "hadamard"), [(Rule.STATIC6, True), (Rule.ADAPTIVE, False)])
def test_a_layer_in_nvfp4_equals_the_reference_and_has_gradients(rule: Rule, hadamard: bool) -> None:
    plain = linear()
    layer = TETrainingLinear(plain, te_nvfp4.recipe(rule, hadamard=hadamard))
    assert layer.weight is plain.weight and layer.bias is plain.bias
    x, grad = numbers(64, INPUTS, seed=1), numbers(64, OUTPUTS, seed=2)
    output, grad_x, grad_weight, _ = run(layer, x, grad)
    weight = reference.quantize(plain.weight.detach(), rule, tile_rows=16)
    expected = reference.matmul(reference.quantize(x, rule), weight, plain.bias.detach())
    # a few groups may use the other scale, and ties the other code
    assert relative_error(output.float(), expected.float()) < 0.02
    _, exact_x, exact_weight = products(x.double(), plain.weight.detach().double(), plain.bias.detach(), grad.double())
    assert relative_error(grad_x.double(), exact_x) < 0.25 and relative_error(grad_weight.double(), exact_weight) < 0.25
