"""Replacement of the linear layers of a transformer by layers that train in NVFP4 or FP8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import nn

from longvideo.kernels.backends import training_backend
from longvideo.kernels.fp8 import te as te_fp8
from longvideo.kernels.fp8.scaled_mm import missing_fp8_units
from longvideo.kernels.nvfp4 import te
from longvideo.kernels.te import outdated
from longvideo.quantization.selection import layers_to_quantize
from longvideo.quantization.training.fp8 import FP8Scaling, FP8TrainingLinear
from longvideo.quantization.training.linear import NVFP4TrainingLinear, make_constants
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
    import torch
    from torch import Tensor

    from longvideo.model.transformer import CausalTransformer
    from longvideo.quantization.training.phase import TrainingPhase
    from longvideo.quantization.training.te_linear import TEDelayedLinear, TETrainingLinear

TrainingBackend = Literal["te", "torch", "emulated"]
"""What computes the products: TransformerEngine, torch's scaled_mm for FP8, or this project's emulation of NVFP4."""
BACKWARD_ALONE = "TransformerEngine cannot round the backward pass alone"
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


class RoundedLinear(Protocol):
    """A layer whose products are in low precision in the passes of its phase."""

    phase: TrainingPhase

    def get_parameter(self, target: str, /) -> nn.Parameter: ...


class DelayedLinear(Protocol):
    """A layer in FP8 with delayed scaling, with the magnitudes of `FP8TrainingLinear`."""

    amaxes: Tensor

    def set_amaxes(self, amaxes: Tensor) -> None: ...


@dataclass(frozen=True)
class TrainingLayers:
    """The layers of a model that train in low precision.

    nvfp4: layers in NVFP4 by name, with TransformerEngine or emulated. fp8: layers in FP8 by name, with
    TransformerEngine or torch. delayed: those of them with delayed scaling. seeds: seeds of stochastic rounding in the
    emulation; None for TransformerEngine, which uses torch's CUDA generator, and where no layer is in NVFP4.
    description: name of the backend, and the reason if it is not TransformerEngine.
    """

    nvfp4: Mapping[str, RoundedLinear]
    fp8: Mapping[str, RoundedLinear]
    delayed: Sequence[DelayedLinear]
    seeds: RoundingSeeds | None
    description: str

    def set_phase(self, phase: TrainingPhase) -> None:
        """Set which passes are in low precision; in the others the layers multiply in the dtype of the input."""
        for layer in (*self.nvfp4.values(), *self.fp8.values()):
            layer.phase = phase


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
        layers: dict[str, RoundedLinear] = {}
        for name, own in zip(names, seeds.values, strict=True):
            layer = NVFP4TrainingLinear.from_linear(_linear(model, name), recipe=recipe, seeds=own)
            model.set_submodule(name, layer)
            layers[name] = layer
        in_fp8 = _replace_by_torch_fp8(model, fp8, FP8Scaling.CURRENT)
        return TrainingLayers(layers, in_fp8, (), seeds, description)
    description = "on FP4 units, through TransformerEngine"
    in_fp8 = _replace_by_te(model, fp8, te_fp8.current_recipe()) if fp8 else {}
    return TrainingLayers(_replace_by_te(model, names, _te_recipe(recipe)), in_fp8, (), None, description)


def train_in_fp8(
    model: CausalTransformer,
    scaling: FP8Scaling,
    *,
    keep: Sequence[str] = (),
    backend: TrainingBackend | None = None,
    backward_alone: bool = False,
) -> TrainingLayers:
    """Replace linear layers in place by layers with the same parameters that train with FP8 products.

    model, keep, backward_alone: as of `train_in_nvfp4`.
    backend: "te" or "torch", which a CPU emulates; by default "te" if it can run.
    Raises ValueError with the reason if the given backend cannot run, and on a GPU without FP8 units.
    """
    names, device = layers_to_quantize(model, keep), model.patch_embedding.weight.device
    reason = _unsupported_in_fp8_by_te(device, scaling, backward_alone=backward_alone)
    if backend == "te" and reason:
        raise ValueError(f"the backend te cannot run on {device}: {reason}; use products.backend=torch")
    if backend == "torch" or reason:
        description = (
            f"through torch's scaled_mm ({reason or 'products.backend=torch'})"
            if device.type == "cuda"
            else "emulated (a CPU has no FP8 units)"
        )
        layers = _replace_by_torch_fp8(model, names, scaling)
        delayed = tuple(layers.values()) if scaling is FP8Scaling.DELAYED else ()
        return TrainingLayers({}, layers, delayed, None, description)
    description = "through TransformerEngine"
    if scaling is FP8Scaling.CURRENT:
        return TrainingLayers({}, _replace_by_te(model, names, te_fp8.current_recipe()), (), None, description)
    in_te = _replace_by_delayed_te(model, names)
    return TrainingLayers({}, in_te, tuple(in_te.values()), None, description)


def _replace_by_torch_fp8(
    model: CausalTransformer, names: Sequence[str], scaling: FP8Scaling
) -> dict[str, FP8TrainingLinear]:
    device = model.patch_embedding.weight.device
    if names and device.type == "cuda" and (reason := missing_fp8_units(device, "FP8 products", "use bf16 for them")):
        raise ValueError(reason)
    layers = {name: FP8TrainingLinear.from_linear(_linear(model, name), scaling=scaling) for name in names}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return layers


def _replace_by_te(model: CausalTransformer, names: Sequence[str], recipe: Any) -> dict[str, TETrainingLinear]:
    # imported here, since it imports the compiler of torch
    from longvideo.quantization.training.te_linear import TETrainingLinear

    layers = {name: TETrainingLinear(_linear(model, name), recipe) for name in names}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return layers


def _replace_by_delayed_te(model: CausalTransformer, names: Sequence[str]) -> dict[str, TEDelayedLinear]:
    from longvideo.quantization.training.te_linear import TEDelayedLinear

    layers = {name: TEDelayedLinear(_linear(model, name)) for name in names}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return layers


def _unsupported_in_fp8_by_te(device: torch.device, scaling: FP8Scaling, *, backward_alone: bool) -> str | None:
    """Return why TransformerEngine cannot train in FP8 like this; None if it can."""
    if backward_alone:
        return BACKWARD_ALONE
    if reason := te_fp8.unavailable(device):
        return reason
    return outdated() if scaling is FP8Scaling.DELAYED else None


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
        return BACKWARD_ALONE
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
