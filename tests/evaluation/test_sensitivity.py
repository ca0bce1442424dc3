"""The effect of layers in NVFP4 on velocities is that of its definition, isolated, and chosen layers fit a budget."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from longvideo.checkpoint.settings import ModelSettings
from longvideo.evaluation.replay import record, replay
from longvideo.evaluation.sensitivity import (
    OPERANDS,
    Effect,
    LayerGroup,
    Operands,
    SensitivityMeasurement,
    Variant,
    choose_kept,
    every_layer,
    layer_groups,
    rounded_layer,
)
from longvideo.evaluation.sensitivity_table import effect_table
from longvideo.kernels.nvfp4 import reference
from longvideo.quantization.convert import with_precision
from tests.quantization.small import CONFIG, SPEC, features, model

SETTINGS = ModelSettings(steps=2, guidance=1.0)
CHUNKS = 3


def measurement(settings: ModelSettings = SETTINGS, num_chunks: int = CHUNKS) -> SensitivityMeasurement:
    own = [features(2, seed) for seed in (2, 3)]
    return SensitivityMeasurement(model(), SPEC, settings, features=own, seeds=[0, 1], num_chunks=num_chunks)


def effects(*groups: LayerGroup, operands: Operands = "both") -> list[Effect]:
    return list(measurement().measure([Variant(group, operands) for group in groups], budget=0).effects)


def nvfp4(x: Tensor) -> Tensor:
    return reference.dequantize(reference.quantize(x))


@pytest.mark.parametrize("operands", OPERANDS)
def test_a_layer_computes_the_product_of_its_rounded_operands(operands: Operands) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(48, 32), torch.randn(5, 48)
    weight = linear.weight if operands == "inputs" else nvfp4(linear.weight.detach())
    expected = nn.functional.linear(x if operands == "weights" else nvfp4(x), weight, linear.bias)
    result = rounded_layer(linear, operands)(x)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(result, linear(x), atol=1e-3)


@pytest.mark.parametrize(
    "settings",
    [SETTINGS, replace(SETTINGS, guidance=2.0), replace(SETTINGS, clean_pass=False)],
    ids=["plain", "guided", "context of the last step"],
)
def test_without_rounded_layers_a_replay_repeats_every_velocity(settings: ModelSettings) -> None:
    transformer = model()
    recording = record(transformer, SPEC, settings, features_PJD=features(2), num_chunks=CHUNKS, seed=0)
    velocities = replay(transformer, SPEC, recording, in_steps={}, in_clean_pass={})
    assert [len(steps) for steps in velocities] == [2] * CHUNKS
    for steps, chunk in zip(velocities, recording.chunks, strict=True):
        for velocity, step in zip(steps, chunk.steps, strict=True):
            assert torch.equal(velocity, step.velocity_BCTHW)
    nothing = every_layer(transformer, keep=["*"])
    assert nothing.layers == ()
    effect = measurement(settings).measure([Variant(nothing, "both")], budget=0).effects[0]
    assert (effect.error, effect.decibels, effect.share) == (0.0, None, 0.0)


@pytest.mark.parametrize(("operands", "precision"), [("weights", "nvfp4-weights"), ("both", "nvfp4")])
def test_all_layers_together_are_the_model_of_that_precision(operands: Operands, precision: str) -> None:
    transformer = model()
    recording = record(transformer, SPEC, SETTINGS, features_PJD=features(2), num_chunks=1, seed=0)
    layers = {name: transformer.get_submodule(name) for name in every_layer(transformer).layers}
    rounded = {name: rounded_layer(layer, operands) for name, layer in layers.items() if isinstance(layer, nn.Linear)}
    ((first, second),) = replay(transformer, SPEC, recording, in_steps=rounded, in_clean_pass={})
    quantized = with_precision(copy.deepcopy(transformer), precision)  # type: ignore[arg-type]
    ((expected, other),) = replay(quantized, SPEC, recording, in_steps={}, in_clean_pass={})
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second, other, rtol=1e-4, atol=1e-5)
    assert all(transformer.get_submodule(name) is layer for name, layer in layers.items())


def test_the_effect_of_one_layer_is_the_relative_error_of_the_velocities() -> None:
    transformer, name = model(), "blocks.1.ffn.2"
    linear = transformer.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    layers = {name: rounded_layer(linear, "both")}
    squares = {"steps": [0.0, 0.0], "clean_pass": [0.0, 0.0]}
    for seed, own in ((0, features(2, 2)), (1, features(2, 3))):
        recording = record(transformer, SPEC, SETTINGS, features_PJD=own, num_chunks=CHUNKS, seed=seed)
        for part, first_chunk in (("steps", 0), ("clean_pass", 1)):
            changed = {"in_steps": {}, "in_clean_pass": {}, f"in_{part}": layers}
            velocities = replay(transformer, SPEC, recording, **changed)
            for steps, chunk in list(zip(velocities, recording.chunks, strict=True))[first_chunk:]:
                for velocity, step in zip(steps, chunk.steps, strict=True):
                    squares[part][0] += float((velocity - step.velocity_BCTHW).double().square().sum())
                    squares[part][1] += float(step.velocity_BCTHW.double().square().sum())
    (effect,) = effects(LayerGroup("layers", name, (name,)))
    steps, clean_pass = (math.sqrt(error / signal) for error, signal in squares.values())
    assert effect.steps == pytest.approx(steps, rel=1e-4) and effect.clean_pass == pytest.approx(clean_pass, rel=1e-4)
    assert effect.error == pytest.approx(math.hypot(steps, clean_pass)) and steps > 0 and clean_pass > 0
    assert effect.decibels == pytest.approx(-20 * math.log10(effect.error))


def test_squared_effects_of_disjoint_layers_add_up_to_that_of_all() -> None:
    transformer = model()
    blocks = layer_groups(transformer, "blocks")
    *parts, whole = effects(*blocks, every_layer(transformer))
    assert sum(part.share for part in parts) == pytest.approx(1) and whole.share == pytest.approx(1)
    assert sum(part.error**2 for part in parts) == pytest.approx(whole.error**2, rel=0.35)


def test_layers_after_the_last_keys_do_not_reach_the_context() -> None:
    last = f"blocks.{CONFIG.num_layers - 1}"
    after, before = effects(*(LayerGroup("layers", name, (f"{last}.{name}",)) for name in ("ffn.0", "self_attn.v")))
    assert after.clean_pass == 0 and after.steps > 0
    assert before.clean_pass is not None and before.clean_pass > 0


def test_groups_cover_every_layer_once() -> None:
    transformer = model()
    for by, number in (("kinds", 10), ("blocks", CONFIG.num_layers), ("layers", 10 * CONFIG.num_layers)):
        groups = layer_groups(transformer, by)  # type: ignore[arg-type]
        assert len(groups) == number
        assert sorted(name for group in groups for name in group.layers) == sorted(every_layer(transformer).layers)


def test_a_video_of_one_chunk_has_no_effect_through_the_context() -> None:
    report = measurement(num_chunks=1).measure([Variant(every_layer(model()), "weights")], budget=0)
    (effect,) = report.effects
    assert effect.clean_pass is None and effect.error == effect.steps > 0
    assert len(report.sigmas) == len(effect.by_step) == 2 and report.sigmas[0] > report.sigmas[1]
    assert effect_table(report.effects, report.sigmas).splitlines()[-1].startswith("| all | 100.0% |")


def test_kept_layers_are_the_most_sensitive_that_fit_the_budget() -> None:
    def single(name: str, share: float, error: float) -> Effect:
        return Effect(Variant(LayerGroup("layers", name, (name,)), "both"), share, (error,), error, 0.0)

    singles = [
        single("wide", 0.3, 0.2),
        single("worst", 0.1, 0.3),
        single("least", 0.1, 0.01),
        single("small", 0.2, 0.1),
    ]
    assert [effect.variant.group.name for effect in choose_kept(singles, 1.0)] == ["worst", "wide", "small", "least"]
    assert [effect.variant.group.name for effect in choose_kept(singles, 0.32)] == ["worst", "small"]
    assert choose_kept(singles, 0) == []


@pytest.mark.parametrize("budget", [0.02, 0.2])
def test_the_rest_of_the_model_is_measured_without_the_kept_layers(budget: float) -> None:
    transformer = model()
    variants = [Variant(every_layer(transformer), "both")]
    variants += [Variant(group, "both") for group in layer_groups(transformer, "layers")]
    report = measurement().measure(variants, budget=budget)
    singles = {effect.variant.group.name: effect for effect in report.effects[1:-1]}
    assert report.kept and sum(singles[name].share for name in report.kept) <= budget
    rest = report.effects[-1]
    assert set(rest.variant.group.layers) == set(every_layer(transformer).layers) - set(report.kept)
    assert rest.error < report.effects[0].error
