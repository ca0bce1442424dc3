"""The number format of the products: recipes by name, parts that replace theirs, phases, and earlier names of keys."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from longvideo.checkpoint.run_checkpoint import RunState
from longvideo.checkpoint.safetensors_file import open_file
from longvideo.config.loading import find_config, load_config
from longvideo.distributed import Mesh
from longvideo.errors import CheckpointError, ConfigError, UserError
from longvideo.kernels.nvfp4.format import Rule
from longvideo.quantization.training.fp8 import FP8Scaling, FP8TrainingLinear
from longvideo.quantization.training.linear import NVFP4TrainingLinear
from longvideo.quantization.training.phase import TrainingPhase
from longvideo.quantization.training.recipe import GradientRounding, TrainingRecipe
from longvideo.quantization.training.recipes import RECIPES
from longvideo.train.clips.config import ClipTraining
from longvideo.train.cost import linear_multiply_adds
from longvideo.train.products import PartsConfig, ProductsConfig, prepare
from longvideo.train.shapeworld.recipe import ArTraining
from longvideo.train.step_rounding import Phases, StepRounding
from longvideo.training.optimizer import OptimizerConfig
from tests.quantization import small

PRESETS: dict[str, type] = {"cpu/ar": ArTraining, "wan/ar": ClipTraining}


def prepared(format: str = "nvfp4", **settings: object) -> tuple[StepRounding, dict[str, nn.Module]]:
    model = small.model()
    config = ProductsConfig(format=format, **settings)  # type: ignore[arg-type]
    phases = config.phases(OptimizerConfig(), 10)
    rounding = prepare(config, model, phases, spec=small.SPEC, seed=0, mesh=Mesh(), warmup_steps=0)
    assert rounding is not None
    return rounding, dict(model.named_modules())


def load(preset: str, overrides: Sequence[str] = ()) -> Any:
    return load_config(PRESETS[preset], [find_config(preset)], overrides)


def test_every_part_of_a_recipe_can_be_replaced_by_its_name() -> None:
    parts = {part.name for part in dataclasses.fields(PartsConfig)}
    assert parts == {part.name for part in dataclasses.fields(TrainingRecipe)}


def test_a_recipe_keeps_its_parts_except_those_that_are_set() -> None:
    for named in RECIPES.values():
        assert PartsConfig().of(named.parts) == named.parts
        changed = PartsConfig(inputs=Rule.STATIC4, tiles=False).of(named.parts)
        assert changed == dataclasses.replace(named.parts, inputs=Rule.STATIC4, tiles=False)


@pytest.mark.parametrize(
    ("num_blocks", "kept"), [(62, [0, 1, *range(54, 62)]), (30, [0, 26, 27, 28, 29]), (8, [7]), (2, [])]
)
def test_nvidia_keeps_the_blocks_of_its_paper_in_proportion_to_the_depth(num_blocks: int, kept: list[int]) -> None:
    assert RECIPES["nvidia"].kept_blocks(num_blocks) == kept
    assert all(RECIPES[name].kept_blocks(num_blocks) == [] for name in RECIPES if name != "nvidia")


def test_the_recipe_reaches_the_layers_and_the_kept_ones_stay_plain() -> None:
    rounding, modules = prepared(recipe="nvidia", parts=PartsConfig(tiles=False), keep=["blocks.0.*"])
    layers = {name: module for name, module in modules.items() if isinstance(module, NVFP4TrainingLinear)}
    assert layers and layers.keys() == rounding.layers.nvfp4.keys()
    assert not any(name.startswith("blocks.0.") for name in layers)
    expected = dataclasses.replace(RECIPES["nvidia"].parts, tiles=False)
    assert {TrainingRecipe.decode(layer.encoded_recipe) for layer in layers.values()} == {expected}


def test_the_start_line_states_the_share_of_the_multiply_adds_in_four_bits() -> None:
    everything, _ = prepared()
    assert everything.description.startswith("NVFP4 for 100.0% of the multiply-adds (recipe best), emulated (")
    some, modules = prepared(keep=["*.ffn.*"], parts=PartsConfig(gradients=GradientRounding.NEAREST))
    work = linear_multiply_adds(small.model(), small.SPEC)
    share = sum(count for name, count in work.items() if isinstance(modules[name], NVFP4TrainingLinear))
    assert f"NVFP4 for {share / sum(work.values()):.1%} of" in some.description
    assert "(recipe best, gradients=nearest)" in some.description


def test_multiply_adds_are_those_of_a_forward_pass() -> None:
    """Counted by hooks in a pass over one chunk, of which training sees two copies."""
    model = small.model()
    counted: dict[str, int] = {}
    for name in linear_multiply_adds(model, small.SPEC):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)

        def count(module: nn.Linear, inputs: tuple[torch.Tensor], _output: object, name: str = name) -> None:
            copies = 1 if name.endswith((".cross_attn.k", ".cross_attn.v")) else 2
            counted[name] = copies * inputs[0].numel() * module.out_features

        layer.register_forward_hook(count)
    small.velocity(model)
    assert counted == linear_multiply_adds(model, small.SPEC)


def test_named_layers_are_in_fp8_even_if_the_recipe_keeps_them_in_bf16() -> None:
    rounding, modules = prepared(recipe="nvidia", fp8=["*.self_attn.*"], keep=["*.self_attn.o"])
    expected = {name for name in modules if name.endswith((".self_attn.q", ".self_attn.k", ".self_attn.v"))}
    layers = {name: module for name, module in modules.items() if isinstance(module, FP8TrainingLinear)}
    assert layers.keys() == rounding.layers.fp8.keys() == expected
    assert {layer.scaling for layer in layers.values()} == {FP8Scaling.CURRENT}
    assert not expected & rounding.layers.nvfp4.keys()
    assert re.match(r"NVFP4 for [\d.]+%, FP8 for [\d.]+% of the multiply-adds \(recipe nvidia\)", rounding.description)
    with pytest.raises(UserError, match="products.fp8 pattern 'blocks.0.attn' matches no linear layer"):
        prepared(fp8=["blocks.0.attn"])


def test_fp8_replaces_all_layers_that_are_not_kept() -> None:
    rounding, modules = prepared("fp8", keep=["blocks.0.*"])
    layers = [name for name, module in modules.items() if isinstance(module, FP8TrainingLinear)]
    assert len(layers) == 10 * (small.CONFIG.num_layers - 1) and not rounding.layers.nvfp4
    assert "(recipe current), emulated (a CPU has no FP8 units)" in rounding.description
    rounding.begin(10)
    assert {layer.phase for layer in rounding.layers.fp8.values()} == {TrainingPhase.NEITHER}


def test_a_run_resumes_with_the_magnitudes_of_delayed_scaling(tmp_path: Path) -> None:
    written, _ = prepared("fp8", recipe="delayed")
    for step in range(3):
        written.begin(step)
        for number, layer in enumerate(written.delayed):
            layer.amaxes[:, 0] = float(step + number)
    save_file(written.state(), tmp_path / "recipe.safetensors")
    stored = open_file(tmp_path / "recipe.safetensors")
    resumed, _ = prepared("fp8", recipe="delayed")
    state = RunState(step=3, ranks=1)
    assert resumed.load(state, [stored]) == []
    for own in (written, resumed):
        own.begin(3)
    assert all(torch.equal(mine.amaxes, own.amaxes) for mine, own in zip(written.delayed, resumed.delayed, strict=True))
    assert resumed.delayed[4].amaxes[0, 1:4].tolist() == [6, 5, 4]
    (note,) = prepared("fp8", recipe="delayed")[0].load(state, [])
    assert note == "the checkpoint has no magnitudes of FP8: the histories of delayed scaling start empty"
    assert prepared("fp8")[0].load(state, [stored]) == []
    with pytest.raises(CheckpointError, match="magnitudes of FP8 have shape .*; resume with the products.keep"):
        prepared("fp8", recipe="delayed", keep=["*.ffn.*"])[0].load(state, [stored])


def test_layers_follow_the_phase_of_the_step() -> None:
    rounding, modules = prepared(until=0.5, tail="forward")
    layers = [module for module in modules.values() if isinstance(module, NVFP4TrainingLinear)]
    for step, phase in (
        (0, TrainingPhase.BOTH),
        (4, TrainingPhase.BOTH),
        (5, TrainingPhase.BACKWARD),
        (9, TrainingPhase.BACKWARD),
    ):
        rounding.begin(step)
        assert {layer.phase for layer in layers} == {phase}
    assert Phases(5, TrainingPhase.NEITHER).at(5) is TrainingPhase.NEITHER


def test_the_onset_of_the_decay_ends_the_first_phase() -> None:
    wsd = OptimizerConfig(schedule="wsd", decay_fraction=0.25)
    phases = ProductsConfig(format="nvfp4", until="decay").phases(wsd, 40)
    assert [phases.at(step) for step in (0, 29, 30, 39)] == [
        TrainingPhase.BOTH,
        TrainingPhase.BOTH,
        TrainingPhase.NEITHER,
        TrainingPhase.NEITHER,
    ]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["products.format=nvfp4", "products.until=decay"],
            "products.until=decay is the step at which .* use optimizer",
        ),
        (
            ["products.recipe=nvidia"],
            "=nvidia is of nvfp4, but products.format is bf16; use products.format=nvfp4",
        ),
        (["products.format=fp8", "products.recipe=best"], "is of nvfp4, but products.format is fp8; .*=current$"),
        (["products.format=fp8", "products.fp8=['*']"], "products.fp8 is of products.format=nvfp4"),
        (
            ["products.format=fp8", "products.backend=emulated"],
            "=emulated does not compute .* use te or torch$",
        ),
        (["products.backend=te"], "products.backend=te does not compute products in bf16; leave it out"),
        (["products.parts.tiles=false"], "products.parts.tiles is of products.format=nvfp4"),
        (["products.format=nvfp4", "products.recipe=foo"], "products.recipe is 'foo'; expected one of 'nvidia'"),
        (
            ["products.format=nvfp4", "products.parts.gradients=ms-eden"],
            "products.parts: gradients=ms-eden is unbiased",
        ),
        (["products.until=1.5"], "products.until is 1.5; expected a number from 0 to 1"),
        (["products.until=late"], "products.until is 'late'; expected"),
    ],
)
def test_settings_that_exclude_each_other_are_refused_in_one_line(
    preset: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load(preset, [*overrides, "optimizer.schedule=cosine"])
    assert "\n" not in str(error.value)


def test_a_backend_that_cannot_run_and_an_unknown_layer_are_refused() -> None:
    with pytest.raises(ConfigError, match="^products: the backend te cannot run on cpu: .*; use emulated$"):
        prepared(backend="te")
    with pytest.raises(UserError, match="'blocks.9.' matches no linear layer"):
        prepared(keep=["blocks.9."])


@pytest.mark.parametrize("preset", PRESETS)
def test_keys_of_the_section_nvfp4_are_read_and_a_line_names_their_present_names(
    preset: str, caplog: pytest.LogCaptureFixture
) -> None:
    present = {
        "nvfp4.enabled=true": "products.format=nvfp4",
        "nvfp4.keep=['*.ffn.*']": "products.keep=['*.ffn.*']",
        "nvfp4.inputs=static6": "products.parts.inputs=static6",
        "nvfp4.weights=adaptive": "products.parts.weights=adaptive",
        "nvfp4.tiles=false": "products.parts.tiles=false",
        "nvfp4.stochastic_gradients=false": "products.parts.gradients=nearest",
        "nvfp4.hadamard=false": "products.parts.hadamard_points=0",
        "nvfp4.until=0.5": "products.until=0.5",
        "nvfp4.backend=emulated": "products.backend=emulated",
    }
    with caplog.at_level(logging.INFO):
        config = load(preset, list(present))
    assert config == load(preset, list(present.values()))
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"command line: {old} is read as {new}; write that" for old, new in present.items()]
    assert load(preset, ["nvfp4.enabled=false"]) == load(preset)
