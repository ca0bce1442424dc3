"""Recipe of training in NVFP4: how the operands of the three products of a step are rounded."""

from __future__ import annotations

from dataclasses import dataclass

from longvideo.kernels.nvfp4.format import Rule


@dataclass(frozen=True)
class TrainingRecipe:
    """Rounding of the operands.

    inputs, weights: rules for rounding to nearest. Gradients always use `static6`, which stochastic rounding keeps
        unbiased.
    tiles: whether weights have tiles of 16 x 16, so that both passes use one rounding; otherwise each pass rounds along
        the dimension that it sums over.
    stochastic_gradients: whether gradients are rounded stochastically.
    hadamard: whether the operands of the weight gradient are transformed.
    """

    inputs: Rule = Rule.ADAPTIVE
    weights: Rule = Rule.STATIC6
    tiles: bool = True
    stochastic_gradients: bool = True
    hadamard: bool = True
