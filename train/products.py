"""Number format of the products of the blocks in training: configuration, recipes, and the layers that it asks for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Literal, cast

from longvideo.config.fields import Bounded, bounded, share
from longvideo.config.loading import Renamed
from longvideo.errors import ConfigError
from longvideo.kernels.nvfp4.format import Rule
from longvideo.quantization.selection import layers_to_quantize, matching_layers
from longvideo.quantization.training.fp8 import FP8Scaling
from longvideo.quantization.training.layers import TrainingBackend, TrainingLayers, train_in_fp8, train_in_nvfp4
from longvideo.quantization.training.phase import TrainingPhase
from longvideo.quantization.training.recipe import (
    BackwardOperands,
    GradientRounding,
    HadamardProducts,
    HadamardSigns,
    TrainingRecipe,
    WeightEstimator,
    WeightsOverTime,
)
from longvideo.quantization.training.recipes import RECIPES, NamedRecipe, RecipeName
from longvideo.quantization.training.weights_over_time import state_bytes
from longvideo.train.cost import linear_multiply_adds
from longvideo.train.step_rounding import Phases, StepRounding
from longvideo.train.weight_states import weight_history
from longvideo.training.optimizer import OptimizerConfig, decay_onset

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from longvideo.distributed import Mesh
    from longvideo.model.spec import ChunkSpec
    from longvideo.model.transformer import CausalTransformer

RECIPE_NAMES: dict[str, tuple[str, ...]] = {
    "bf16": (),
    "fp8": tuple(scaling.value for scaling in FP8Scaling),
    "nvfp4": tuple(RECIPES),
}
"""Names of the recipes of each format."""
BACKEND_NAMES: dict[str, tuple[TrainingBackend, ...]] = {
    "bf16": (),
    "fp8": ("te", "torch"),
    "nvfp4": ("te", "emulated"),
}
"""Backends of each format, the first that can run is the default."""


@dataclass(frozen=True)
class PartsConfig(Bounded):
    """Single parts that replace those of the recipe; null is the recipe's own part.

    inputs: rule for the scales of inputs, such as `static6` or `adaptive`.
    weights: rule for the scales of weights, such as `static6` or `adaptive`.
    tiles: whether a scale of the weights covers a tile of 16 x 16 values rather than 16 values of a row.
    backward_operands: what weights and inputs of the backward products are rounded from: `originals`, or `dequantized`
        operands of the forward product.
    gradients: rounding of gradients: `nearest`, `stochastic`, `ms-eden`, `luq` or `radix4`.
    hadamard_points: number of points of the random Hadamard transform: 16, 64 or 128; 0 for no transform.
    hadamard_products: products whose operands are transformed: `wgrad`, or `both` backward products.
    hadamard_signs: signs of the transform: `fixed`, or `redrawn` for every pass.
    estimator: derivative of the rounding of weights: `straight-through`, or `dge`.
    outlier_quantile: quantile of the magnitudes of inputs, up to 1, at which they are clamped; what exceeds it is
        multiplied in 16 bits.
    weights_over_time: what happens to weights that oscillate between two numbers in 4 bits: `none`, `q-ema`,
        `q-ramping` or `reset`.
    average_decay: decay of the averages of `q-ema` for each step.
    measure_oscillation: whether the share of oscillating weights is measured where nothing needs it.
    oscillation_every: number of steps between the ends of two measurements.
    oscillation_steps: number of steps of a measurement.
    oscillation_bound: path of a rounded weight divided by that of the weight from which on the weight oscillates.
    ramping_unit: ratio of paths for which `q-ramping` averages `ramping_gain` more gradients.
    ramping_gain: number of those gradients.
    ramping_most: largest number of gradients that `q-ramping` averages.
    """

    inputs: Rule | None = None
    weights: Rule | None = None
    tiles: bool | None = None
    backward_operands: BackwardOperands | None = None
    gradients: GradientRounding | None = None
    hadamard_points: int | None = bounded(None, least=0)
    hadamard_products: HadamardProducts | None = None
    hadamard_signs: HadamardSigns | None = None
    estimator: WeightEstimator | None = None
    outlier_quantile: float | None = bounded(None, above=0, most=1)
    weights_over_time: WeightsOverTime | None = None
    average_decay: float | None = bounded(None, least=0, below=1)
    measure_oscillation: bool | None = None
    oscillation_every: int | None = bounded(None, least=1)
    oscillation_steps: int | None = bounded(None, least=1)
    oscillation_bound: float | None = bounded(None, above=0)
    ramping_unit: float | None = bounded(None, above=0)
    ramping_gain: int | None = bounded(None, least=1)
    ramping_most: int | None = bounded(None, least=1)

    @property
    def replaced(self) -> dict[str, object]:
        """The parts that are set, by name."""
        parts = {part.name: getattr(self, part.name) for part in dataclasses.fields(self)}
        return {name: value for name, value in parts.items() if value is not None}

    def of(self, recipe: TrainingRecipe) -> TrainingRecipe:
        """Return a recipe with the parts that are set here in place of its own."""
        return dataclasses.replace(recipe, **self.replaced)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ProductsConfig(Bounded):
    """Number format of the products of the blocks' linear layers, forward and backward.

    format: `bf16` leaves the products in the dtype of `trainer.precision`; `fp8` and `nvfp4` round their operands to 8
        and 4 bits.
    recipe: for nvfp4 `nvidia`, `quartet2`, `tetrajet2` or `best`, which is the default; for fp8 `current`, which is the
        default, or `delayed`.
    parts: single parts of a recipe of nvfp4 that are replaced.
    keep: layers of the blocks that stay in bf16, by official name, `*` for anything, in addition to the recipe's.
    fp8: with nvfp4, layers of the blocks in FP8, by official name, also those that the recipe keeps in bf16.
    until: share of all steps with products in this format, or `decay`: up to the step at which the learning rate of
        `optimizer.schedule=wsd` starts to decay.
    tail: products of the steps after `until`: `bf16`, or `forward`, which leaves only the forward pass in bf16.
    backend: `te` (TransformerEngine: nvfp4 on Blackwell, fp8 on Hopper and newer), or in its place `emulated` for nvfp4
        and `torch` for fp8; by default the first that can run.
    """

    format: Literal["bf16", "fp8", "nvfp4"] = "bf16"
    recipe: Literal["nvidia", "quartet2", "tetrajet2", "best", "current", "delayed"] | None = None
    parts: PartsConfig = field(default_factory=PartsConfig)
    keep: list[str] = field(default_factory=list)
    fp8: list[str] = field(default_factory=list)
    until: float | int | Literal["decay"] = share(1.0)
    tail: Literal["bf16", "forward"] = "bf16"
    backend: TrainingBackend | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recipe is not None and self.recipe not in (recipes := RECIPE_NAMES[self.format]):
            owner = next(name for name, known in RECIPE_NAMES.items() if self.recipe in known)
            use = f"use products.format={owner} or products.recipe={recipes[0] if recipes else 'null'}"
            raise ConfigError(
                f"products.recipe={self.recipe} is of {owner}, but products.format is {self.format}; {use}"
            )
        if self.backend is not None and self.backend not in (backends := BACKEND_NAMES[self.format]):
            use = f"use {' or '.join(backends)}" if backends else "leave it out"
            raise ConfigError(f"products.backend={self.backend} does not compute products in {self.format}; {use}")
        if self.format == "nvfp4":
            try:
                self.nvfp4_recipe()
            except ValueError as error:
                raise ConfigError(f"products.parts: {error}") from error
            return
        settings = {"fp8": self.fp8, **{f"parts.{name}": True for name in self.parts.replaced}}
        for name, value in settings.items():
            if value:
                raise ConfigError(
                    f"products.{name} is of products.format=nvfp4, but products.format is {self.format}; use"
                    f" products.format=nvfp4 or leave products.{name} out"
                )

    def nvfp4_recipe(self) -> tuple[str, NamedRecipe]:
        """Return the recipe of products in 4 bits, with the parts that are set, and its name with them."""
        name = "best" if self.recipe is None else self.recipe
        named = RECIPES[cast("RecipeName", name)]
        shown = "".join(f", {part}={_shown(value)}" for part, value in self.parts.replaced.items())
        return f"{name}{shown}", dataclasses.replace(named, parts=self.parts.of(named.parts))

    @property
    def keeps_outliers(self) -> bool:
        """Whether layers keep outliers of their inputs in 16 bits for the backward pass."""
        return self.format == "nvfp4" and self.nvfp4_recipe()[1].parts.outlier_quantile < 1

    def phases(self, optimizer: OptimizerConfig, total_steps: int) -> Phases:
        """Return the phase of every step. Raises ConfigError where the learning rate has no onset of a decay."""
        tail = TrainingPhase.BACKWARD if self.tail == "forward" else TrainingPhase.NEITHER
        if self.until != "decay":
            return Phases(self.until * total_steps, tail)
        if optimizer.schedule != "wsd":
            raise ConfigError(
                f"products.until=decay is the step at which the learning rate starts to decay, but"
                f" optimizer.schedule={optimizer.schedule} has no such step; use optimizer.schedule=wsd, or a share"
                " of the steps such as products.until=0.8"
            )
        return Phases(decay_onset(optimizer, total_steps), tail)


NVFP4_KEYS = {
    "nvfp4.enabled": Renamed("products.format", {True: "nvfp4", False: "bf16"}),
    "nvfp4.keep": Renamed("products.keep"),
    "nvfp4.until": Renamed("products.until"),
    "nvfp4.backend": Renamed("products.backend"),
    "nvfp4.inputs": Renamed("products.parts.inputs"),
    "nvfp4.weights": Renamed("products.parts.weights"),
    "nvfp4.tiles": Renamed("products.parts.tiles"),
    "nvfp4.stochastic_gradients": Renamed("products.parts.gradients", {True: "stochastic", False: "nearest"}),
    "nvfp4.hadamard": Renamed("products.parts.hadamard_points", {True: 16, False: 0}),
}
"""Keys of the section `nvfp4`, which earlier versions had, and their present names."""


def prepare(
    config: ProductsConfig,
    transformer: CausalTransformer,
    phases: Phases,
    *,
    spec: ChunkSpec,
    seed: int,
    mesh: Mesh,
    warmup_steps: int,
) -> StepRounding | None:
    """Prepare a transformer, which is on its device, for training as configured; None if nothing is to round.

    warmup_steps: number of steps in which the learning rate rises; weights are followed after them.
    """
    if config.format == "bf16":
        return None
    work, history = linear_multiply_adds(transformer, spec), None
    try:
        if config.format == "fp8":
            name = config.recipe or FP8Scaling.CURRENT.value
            layers = train_in_fp8(
                transformer,
                FP8Scaling(name),
                keep=config.keep,
                backend=config.backend,
                backward_alone=phases.tail is TrainingPhase.BACKWARD,
            )
        else:
            name, recipe = config.nvfp4_recipe()
            layers = _in_nvfp4(config, transformer, recipe, backward_alone=phases.tail is TrainingPhase.BACKWARD)
            history = weight_history(layers, recipe.parts, mesh=mesh, start=warmup_steps)
    except ValueError as error:
        raise ConfigError(f"products: {error}") from error
    formats = [("NVFP4", layers.nvfp4), ("FP8", layers.fp8)]
    shares = [f"{format} for {_share(own, work):.1%}" for format, own in formats if own]
    description = f"{', '.join(shares)} of the multiply-adds (recipe {name}), {layers.description}"
    return StepRounding(layers, phases, seed=seed, mesh=mesh, description=description, history=history)


def weight_state_bytes(config: ProductsConfig, transformer: CausalTransformer, *, ranks: int) -> float:
    """Return the bytes on a rank of the states of the weights that train in 4 bits, without the moments.

    transformer: model of the shape that will train, on any device. Raises ConfigError for an unknown layer in `keep`.
    """
    if config.format != "nvfp4":
        return 0.0
    recipe = config.nvfp4_recipe()[1]
    blocks = recipe.kept_blocks(len(transformer.blocks))
    try:
        names = layers_to_quantize(transformer, [*config.keep, *(f"blocks.{n}.*" for n in blocks), *config.fp8])
    except ValueError as error:
        raise ConfigError(f"products: {error}") from error
    num_weights = sum(transformer.get_parameter(f"{name}.weight").numel() for name in names)
    return state_bytes(recipe.parts, num_weights, ranks=ranks)


def _in_nvfp4(
    config: ProductsConfig, transformer: CausalTransformer, recipe: NamedRecipe, *, backward_alone: bool
) -> TrainingLayers:
    kept = set(matching_layers(transformer, config.keep, what="products.keep"))
    blocks = recipe.kept_blocks(len(transformer.blocks))
    return train_in_nvfp4(
        transformer,
        recipe.parts,
        keep=[*config.keep, *(f"blocks.{number}.*" for number in blocks)],
        fp8=[name for name in matching_layers(transformer, config.fp8, what="products.fp8") if name not in kept],
        backend=config.backend,
        backward_alone=backward_alone,
    )


def _share(layers: Iterable[str], work: Mapping[str, int]) -> float:
    return sum(work[name] for name in layers) / sum(work.values())


def _shown(value: object) -> object:
    return value.value if isinstance(value, Enum) else value
