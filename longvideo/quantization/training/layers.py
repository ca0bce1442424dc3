"""Replacement of the linear layers of a transformer by layers that train in NVFP4 or FP8."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from longvideo.kernels.backends import training_backend
from longvideo.kernels.fp8.scaled_mm import missing_fp8_units
from longvideo.kernels.nvfp4 import te
from longvideo.quantization.selection import layers_to_quantize
from longvideo.quantization.training.fp8 import FP8Scaling, FP8TrainingLinear
from longvideo.quantization.training.linear import NVFP4TrainingLinear, make_constants
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
from longvideo.quantization.training.seeds import RoundingSeeds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longvideo.model.transformer import CausalTransformer

TrainingBackend = Literal["te", "emulated"]
"""What computes the products of NVFP4 training: TransformerEngine, or this project's emulation."""
TE_PARTS: dict[str, tuple[Enum | float, ...]] = {
    "backward_operands": (BackwardOperands.ORIGINALS,),
    "gradients": (GradientRounding.NEAREST, GradientRounding.STOCHASTIC),
    "hadamard_points": (0, 16),
    "hadamard_products": (HadamardProducts.WGRAD,),
    "hadamard_signs": (HadamardSigns.FIXED,),
    "estimator": (WeightEstimator.STRAIGHT_THROUGH,),
    "outlier_quantile": (1.0,),
    "weights_over_time": (WeightsOverTime.NONE, WeightsOverTime.Q_RAMPING, WeightsOverTime.RESET),
}
"""Values of a recipe's settings that TransformerEngine supports; it refuses some combinations itself."""


@dataclass(frozen=True)
class TrainingLayers:
    """The layers of a model that train in low precision.

    nvfp4: layers in NVFP4 by name, with TransformerEngine or emulated. fp8: layers in FP8 by name. seeds: seeds of
    stochastic rounding in the emulation; None for TransformerEngine, which uses torch's CUDA generator, and where no
    layer is in NVFP4. description: name of the backend, and the reason if it is emulated.
    """

    nvfp4: dict[str, nn.Module]
    fp8: dict[str, FP8TrainingLinear]
    seeds: RoundingSeeds | None
    description: str

    def set_phase(self, phase: TrainingPhase) -> None:
        """Set which passes are in low precision; in the others the layers multiply in the dtype of the input."""
        for layer in (*self.nvfp4.values(), *self.fp8.values()):
            if isinstance(layer, NVFP4TrainingLinear | FP8TrainingLinear):
                layer.phase = phase
            else:
                setattr(layer, "rounds", phase is TrainingPhase.BOTH)  # noqa: B010 - TransformerEngine's type is unknown here


def train_in_nvfp4(
    model: CausalTransformer,
    recipe: TrainingRecipe,
    *,
    keep: Sequence[str] = (),
    fp8: Sequence[str] = (),
    backend: TrainingBackend | None = None,
    backward_alone: bool = False,
) -> TrainingLayers:
    """Replace linear layers in place by layers with the same parameters that train with NVFP4 products.

    model: model on the device where it will train.
    keep: patterns of layers that are not replaced, see `layers_to_quantize`; arXiv 2509.25149 keeps the first and last
        blocks.
    fp8: names of layers that train in FP8 instead, with current scaling, whatever `keep` names.
    backend: "te" or "emulated"; by default "te" if it can run and supports the recipe.
    backward_alone: whether some steps round the backward pass alone (`TrainingPhase.BACKWARD`).
    Raises ValueError with the reason if the given backend cannot run.
    """
    names = layers_to_quantize(model, [*keep, *fp8])
    device = model.patch_embedding.weight.device
    reason = training_backend(device).reason or _unsupported_by_te(recipe, backward_alone=backward_alone)
    if backend == "te" and reason:
        raise ValueError(f"the backend te cannot run on {device}: {reason}; use emulated")
    if backend == "emulated" or reason:
        description = f"emulated ({reason or 'products.backend=emulated'})"
        seeds = RoundingSeeds(len(names), device)
        make_constants(recipe, device)
        layers: dict[str, nn.Module] = {
            name: NVFP4TrainingLinear.from_linear(_linear(model, name), recipe=recipe, seeds=own)
            for name, own in zip(names, seeds.values, strict=True)
        }
    else:
        description = "on FP4 units, through TransformerEngine"
        te_recipe, seeds = _te_recipe(recipe), None
        layers = {name: te.training_linear(_linear(model, name), te_recipe) for name in names}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return TrainingLayers(layers, _replace_by_fp8(model, fp8, FP8Scaling.CURRENT), seeds, description)


def train_in_fp8(model: CausalTransformer, scaling: FP8Scaling, *, keep: Sequence[str] = ()) -> TrainingLayers:
    """Replace linear layers in place by layers with the same parameters that train with FP8 products.

    model, keep: as of `train_in_nvfp4`. Raises ValueError with the reason on a GPU without FP8 units.
    """
    layers = _replace_by_fp8(model, layers_to_quantize(model, keep), scaling)
    on_gpu = model.patch_embedding.weight.device.type == "cuda"
    return TrainingLayers(
        {}, layers, None, "through torch's scaled_mm" if on_gpu else "emulated (a CPU has no FP8 units)"
    )


def _replace_by_fp8(
    model: CausalTransformer, names: Sequence[str], scaling: FP8Scaling
) -> dict[str, FP8TrainingLinear]:
    device = model.patch_embedding.weight.device
    if names and device.type == "cuda" and (reason := missing_fp8_units(device, "FP8 products", "use bf16 for them")):
        raise ValueError(reason)
    layers = {name: FP8TrainingLinear.from_linear(_linear(model, name), scaling=scaling) for name in names}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return layers


def _te_recipe(recipe: TrainingRecipe) -> Any:
    return te.recipe(
        recipe.weights,
        stochastic_gradients=recipe.gradients is GradientRounding.STOCHASTIC,
        hadamard=recipe.hadamard_points > 0,
        tiled_weights=recipe.tiles,
    )


def _unsupported_by_te(recipe: TrainingRecipe, *, backward_alone: bool) -> str | None:
    """Return why TransformerEngine does not support a recipe; None if it does."""
    if backward_alone:
        return "TransformerEngine cannot round the backward pass alone"
    if recipe.inputs is not recipe.weights:
        return (
            f"TransformerEngine rounds inputs and weights by one rule, not {recipe.inputs.value} and"
            f" {recipe.weights.value}; use static6 for both"
        )
    for name, values in TE_PARTS.items():
        if (value := getattr(recipe, name)) not in values:
            return f"TransformerEngine has no {name}={value.value if isinstance(value, Enum) else value}"
    try:
        _te_recipe(recipe)
    except (ValueError, ImportError) as error:
        return str(error)
    return None


def _linear(model: CausalTransformer, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer
