"""A recipe for each part of training in NVFP4, on its own or with what it needs."""

from __future__ import annotations

from dataclasses import replace

from longvideo.quantization.training.recipe import (
    BackwardOperands,
    GradientRounding,
    HadamardProducts,
    HadamardSigns,
    TrainingRecipe,
    WeightEstimator,
)

DEQUANTIZED = BackwardOperands.DEQUANTIZED
MS_EDEN = TrainingRecipe(
    gradients=GradientRounding.MS_EDEN,
    hadamard_points=128,
    hadamard_products=HadamardProducts.BOTH,
    hadamard_signs=HadamardSigns.REDRAWN,
)
PARTS = {
    "default": TrainingRecipe(),
    "rows": TrainingRecipe(tiles=False),
    "dequantized": TrainingRecipe(backward_operands=DEQUANTIZED),
    "dequantized rows": TrainingRecipe(backward_operands=DEQUANTIZED, tiles=False),
    "nearest": TrainingRecipe(gradients=GradientRounding.NEAREST),
    "luq": TrainingRecipe(gradients=GradientRounding.LUQ),
    "radix4": TrainingRecipe(gradients=GradientRounding.RADIX4),
    "no transform": TrainingRecipe(hadamard_points=0),
    "64 points": TrainingRecipe(hadamard_points=64),
    "128 points": TrainingRecipe(hadamard_points=128),
    "redrawn": TrainingRecipe(hadamard_signs=HadamardSigns.REDRAWN),
    "both": TrainingRecipe(hadamard_products=HadamardProducts.BOTH),
    "both dequantized": TrainingRecipe(hadamard_products=HadamardProducts.BOTH, backward_operands=DEQUANTIZED),
    "ms-eden": MS_EDEN,
    "ms-eden dequantized": replace(MS_EDEN, backward_operands=DEQUANTIZED, tiles=False),
    "dge": TrainingRecipe(estimator=WeightEstimator.DGE),
    "outliers": TrainingRecipe(outlier_quantile=0.97),
    "outliers dequantized": TrainingRecipe(outlier_quantile=0.97, backward_operands=DEQUANTIZED),
}
DETERMINISTIC = ("nearest", "radix4")
"""Parts without random numbers."""


def without_host_draws(recipe: TrainingRecipe) -> TrainingRecipe:
    """Return a recipe without stochastic rounding, which draws from a generator on the host in plain torch."""
    is_stochastic = recipe.gradients is GradientRounding.STOCHASTIC
    return replace(recipe, gradients=GradientRounding.NEAREST) if is_stochastic else recipe
