"""The two backward products of a training layer: how their operands are transformed and rounded.

Shapes: R rows, K values that a product sums over, M and C rows and columns of a matrix that is transposed first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from longvideo.kernels.backends import NVFP4Operations, nvfp4_operations
from longvideo.kernels.nvfp4 import draws
from longvideo.kernels.nvfp4.format import GROUP, ExactOperand, NVFP4Tensor, Rule
from longvideo.kernels.nvfp4.hadamard import random_hadamard
from longvideo.kernels.nvfp4.luq import quantize_luq_exact
from longvideo.kernels.nvfp4.ms_eden import quantize_ms_eden
from longvideo.kernels.nvfp4.radix4 import Phase, quantize_radix4_exact
from longvideo.quantization.training.recipe import GradientRounding, HadamardProducts, HadamardSigns, TrainingRecipe

SIGNS, GRADIENTS, OTHERS = range(3)
"""Streams of the seed of a product: signs of the transform, rounding of gradients, rounding of the other operand."""


@dataclass(frozen=True)
class BackwardProduct:
    """A backward product: gradients times weights (dgrad), or gradients times inputs (wgrad).

    operations: kernels on the device of the layer.
    seed: seed of all random numbers of the product, int64 scalar on that device.
    points: number of points of the Hadamard transform of both operands, 0 for no transform.
    phase: phase of radix-4 FP4.
    """

    operations: NVFP4Operations
    recipe: TrainingRecipe
    seed: Tensor
    points: int
    phase: Phase

    @classmethod
    def dgrad(cls, recipe: TrainingRecipe, seeds: Tensor) -> BackwardProduct:
        """Return the product for the gradient of the inputs. seeds: those of the layer."""
        points = recipe.hadamard_points if recipe.hadamard_products is HadamardProducts.BOTH else 0
        return cls(nvfp4_operations(seeds.device), recipe, seeds[0], points, Phase.EVEN)

    @classmethod
    def wgrad(cls, recipe: TrainingRecipe, seeds: Tensor) -> BackwardProduct:
        """Return the product for the gradient of the weights. seeds: those of the layer."""
        return cls(nvfp4_operations(seeds.device), recipe, seeds[1], recipe.hadamard_points, Phase.ODD)

    def round_gradient(self, grad: Tensor, *, across: bool) -> ExactOperand:
        """Return the operand of a gradient [R, K], or with `across` that of its transpose [M, C]."""
        rounding, dtype = self.recipe.gradients, grad.dtype
        if rounding in (GradientRounding.NEAREST, GradientRounding.STOCHASTIC):
            seed = self.seed if rounding is GradientRounding.STOCHASTIC else None
            if across and self._kernels_transform:
                return self.operations.quantize_across_exact(
                    grad, Rule.STATIC6, hadamard=self.points > 0, seed=seed, dtype=dtype
                )
            arranged = self._transformed(self._arranged(grad, across))
            return self.operations.quantize_exact(arranged, Rule.STATIC6, seed=seed, dtype=dtype)
        if rounding is GradientRounding.MS_EDEN:
            return self.operations.exact(self._ms_eden(self._arranged(grad, across), GRADIENTS), dtype)
        arranged = self._transformed(self._arranged(grad, across))
        if rounding is GradientRounding.LUQ:
            return quantize_luq_exact(arranged, self._draw(arranged.shape, GRADIENTS), dtype=dtype)
        return quantize_radix4_exact(arranged, self.phase, dtype=dtype)

    def round_other(self, x_MC: Tensor, rule: Rule) -> NVFP4Tensor:
        """Return the transpose of weights or inputs, rounded along M."""
        if self.recipe.gradients is GradientRounding.MS_EDEN:
            return self._ms_eden(self._arranged(x_MC, across=True), OTHERS)
        if self._kernels_transform:
            return self.operations.quantize_across(x_MC, rule, hadamard=self.points > 0)
        return self.operations.quantize(self._transformed(self._arranged(x_MC, across=True)), rule)

    def padded(self, size: int) -> int:
        """Return the number of values that the product sums over, which is `size` before padding with zeros."""
        multiple = max(self.points, GROUP)
        return -(-size // multiple) * multiple

    @property
    def _kernels_transform(self) -> bool:
        """Whether the kernels apply the transform while they quantize across rows, with the same bits."""
        return self.points == 0 or (self.points == GROUP and self.recipe.hadamard_signs is HadamardSigns.FIXED)

    @property
    def _signs(self) -> Tensor | None:
        if self.recipe.hadamard_signs is HadamardSigns.FIXED:
            return None
        return draws.signs(self.seed, self.points, stream=SIGNS)

    def _arranged(self, x: Tensor, across: bool) -> Tensor:
        turned = x.t() if across else x
        return F.pad(turned, (0, self.padded(turned.shape[-1]) - turned.shape[-1])).contiguous()

    def _transformed(self, x_RK: Tensor) -> Tensor:
        return random_hadamard(x_RK, self.points, signs=self._signs) if self.points else x_RK

    def _ms_eden(self, x_RK: Tensor, stream: int) -> NVFP4Tensor:
        rows, values = x_RK.shape
        return quantize_ms_eden(x_RK, self._signs, self._draw(torch.Size((rows, values // GROUP)), stream))

    def _draw(self, shape: torch.Size, stream: int) -> Tensor:
        return draws.uniform(self.seed, shape, stream=stream)
