"""How many values of the inputs and gradients of a layer become zero when they are rounded to 4 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longvideo.kernels.backends import nvfp4_operations
from longvideo.kernels.nvfp4.outliers import split_outliers
from longvideo.quantization.training.backward_products import BackwardProduct

if TYPE_CHECKING:
    from torch import Tensor

    from longvideo.quantization.training.recipe import TrainingRecipe


def input_underflow(recipe: TrainingRecipe, x_MI: Tensor) -> Tensor:
    """Return the number of values that are zero after the rounding of the forward product, and not before."""
    clamped = split_outliers(x_MI, recipe.outlier_quantile)[0] if recipe.outlier_quantile < 1 else x_MI
    rounded = nvfp4_operations(x_MI.device).quantize_exact(clamped.contiguous(), recipe.inputs, dtype=x_MI.dtype)
    return (rounded.values == 0).sum() - (x_MI == 0).sum()


def gradient_underflow(recipe: TrainingRecipe, seeds: Tensor, grad_MO: Tensor) -> Tensor:
    """Return the number of values that are zero after the rounding for dgrad, and not before.

    seeds: those of the layer, so that this rounding is that of the step. With a Hadamard transform on dgrad, zeros of
    the transformed gradient count.
    """
    rounded = BackwardProduct.dgrad(recipe, seeds).round_gradient(grad_MO.contiguous(), across=False)
    return ((rounded.values == 0).sum() - (grad_MO == 0).sum()).clamp_min(0)
