"""The rounding of weights in the forward product."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longvideo.kernels.nvfp4.averaged import round_toward_average
from longvideo.kernels.nvfp4.format import GROUP

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from longvideo.kernels.backends import NVFP4Operations
    from longvideo.kernels.nvfp4.format import ExactOperand
    from longvideo.quantization.training.recipe import TrainingRecipe


def rounded_weight(
    operations: NVFP4Operations,
    weight_OI: Tensor,
    average_OI: Tensor,
    recipe: TrainingRecipe,
    dtype: torch.dtype,
) -> ExactOperand:
    """Round a weight to nearest, or, unless its average is empty, to the neighbor that is nearer to the average."""
    if average_OI.numel():
        tile_rows = GROUP if recipe.tiles else 1
        return round_toward_average(weight_OI, average_OI, recipe.weights, tile_rows=tile_rows, dtype=dtype)
    rounded = operations.quantize_tiles_exact if recipe.tiles else operations.quantize_exact
    return rounded(weight_OI, recipe.weights, dtype=dtype)
