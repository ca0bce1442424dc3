"""Named recipes of training in NVFP4, each an assembly of the parts of `TrainingRecipe`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from longvideo.kernels.nvfp4.format import Rule
from longvideo.quantization.training.recipe import (
    BackwardOperands,
    GradientRounding,
    HadamardProducts,
    HadamardSigns,
    TrainingRecipe,
    WeightsOverTime,
)

RecipeName = Literal["nvidia", "quartet2", "tetrajet2", "best"]


@dataclass(frozen=True)
class NamedRecipe:
    """Parts of a recipe, and the share of the blocks that it leaves in higher precision.

    first, last: shares of the blocks, from the first one on and up to the last one, that are not quantized. The number
    of blocks is rounded to nearest.
    """

    parts: TrainingRecipe
    first: float = 0.0
    last: float = 0.0

    def kept_blocks(self, num_blocks: int) -> list[int]:
        """Return the numbers of the blocks that are not quantized, of a model with `num_blocks`."""
        first, last = round(self.first * num_blocks), round(self.last * num_blocks)
        return [number for number in range(num_blocks) if number < first or number >= num_blocks - last]


RECIPES: dict[RecipeName, NamedRecipe] = {
    # arXiv 2509.25149 keeps the first two and the last eight of the 62 blocks of a model with 12 billion parameters
    "nvidia": NamedRecipe(TrainingRecipe(inputs=Rule.STATIC6), first=2 / 62, last=8 / 62),
    "quartet2": NamedRecipe(
        TrainingRecipe(
            inputs=Rule.ADAPTIVE,
            weights=Rule.ADAPTIVE,
            tiles=False,
            backward_operands=BackwardOperands.DEQUANTIZED,
            gradients=GradientRounding.MS_EDEN,
            hadamard_points=128,
            hadamard_products=HadamardProducts.BOTH,
            hadamard_signs=HadamardSigns.REDRAWN,
        )
    ),
    "tetrajet2": NamedRecipe(
        TrainingRecipe(
            inputs=Rule.STATIC6,
            weights=Rule.STATIC6,
            tiles=False,
            backward_operands=BackwardOperands.DEQUANTIZED,
            gradients=GradientRounding.STOCHASTIC,
            hadamard_points=0,
            weights_over_time=WeightsOverTime.RESET,
        )
    ),
    "best": NamedRecipe(TrainingRecipe(inputs=Rule.ADAPTIVE)),
}
"""Recipes by name.

nvidia: "Pretraining Large Language Models with NVFP4" (arXiv 2509.25149): weights in tiles of 16 x 16, stochastic
    rounding of gradients, a Hadamard transform of 16 points on the weight gradient, `static6` for all operands, and the
    blocks of the paper in higher precision, in proportion to the depth.
quartet2: Quartet II (arXiv 2601.22813): groups of 1 x 16 under `adaptive` in the forward product; MS-EDEN with redrawn
    signs for all operands of both backward products, whose weights and inputs come from the dequantized ones.
tetrajet2: TetraJet-v2 (arXiv 2510.27527): groups of 1 x 16, stochastic rounding of gradients, backward operands from
    the dequantized ones, here rounded to nearest, and the reset of oscillating weights. Its control of outliers is not
    part of this.
best: the parts of `nvidia` with `adaptive` inputs and all blocks in 4 bits, which has the lowest loss of the recipes
    that docs/nvfp4.md compares on tiny-teacher ("What training in four bits costs"), up to differences between equal
    runs.
"""
