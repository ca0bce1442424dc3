"""The states of a transformer's weights that train in 4 bits, and what measures its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longvideo.quantization.training.linear import NVFP4TrainingLinear
from longvideo.quantization.training.weights_over_time import WeightHistory
from longvideo.training.layer_watch import LayerWatch

if TYPE_CHECKING:
    from longvideo.distributed import Mesh
    from longvideo.quantization.training.layers import TrainingLayers
    from longvideo.quantization.training.recipe import TrainingRecipe

TRANSFORMER = "transformer"
"""Name of the transformer in the objectives that train it."""


def layer_watch(layers: TrainingLayers) -> LayerWatch | None:
    """Return what measures the emulated layers in 4 bits, or None if no layer is emulated."""
    emulated = {
        f"{TRANSFORMER}.{name}.weight": layer
        for name, layer in layers.nvfp4.items()
        if isinstance(layer, NVFP4TrainingLinear)
    }
    return LayerWatch(emulated) if emulated else None


def weight_history(layers: TrainingLayers, recipe: TrainingRecipe, *, mesh: Mesh, start: int) -> WeightHistory | None:
    """Return the states of the weights of layers in 4 bits, or None if the recipe needs none.

    mesh: all ranks, which hold the same weights. start: first step whose weights are followed.
    """
    if not recipe.follows_weights:
        return None
    by_weight = {f"{TRANSFORMER}.{name}.weight": layer for name, layer in layers.nvfp4.items()}
    weights = {name: layer.get_parameter("weight") for name, layer in by_weight.items()}
    history = WeightHistory(weights, recipe, mesh=mesh, start=start)
    for name, average in history.averages.items():
        layer = by_weight[name]
        assert isinstance(layer, NVFP4TrainingLinear)  # TransformerEngine's layers are refused with averages
        layer.round_toward(average)
    return history
