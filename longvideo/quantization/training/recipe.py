"""Recipe of training in NVFP4: how the operands of the three products of a step are rounded.

The products are forward (inputs times weights), dgrad (the gradient of the inputs: gradients times weights) and wgrad
(the gradient of the weights: gradients times inputs).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from enum import Enum

from longvideo.kernels.nvfp4 import ms_eden
from longvideo.kernels.nvfp4.format import Rule
from longvideo.kernels.nvfp4.hadamard import HADAMARD_POINTS


class BackwardOperands(str, Enum):
    """What the weights and inputs of the backward products are rounded from.

    originals: the numbers before the rounding of the forward product.
    dequantized: the rounded numbers of the forward product, rounded once more along the dimension that the backward
        product sums over, so that both passes see the same weights and inputs (arXiv 2510.27527, 2601.22813).
    """

    ORIGINALS = "originals"
    DEQUANTIZED = "dequantized"


class GradientRounding(str, Enum):
    """How the gradients are rounded, in the order of nearest, stochastic, MS-EDEN, LUQ and radix-4 FP4.

    ms-eden also rounds the weights and inputs of the backward products, in place of their rules.
    """

    NEAREST = "nearest"
    STOCHASTIC = "stochastic"
    MS_EDEN = "ms-eden"
    LUQ = "luq"
    RADIX4 = "radix4"


class HadamardProducts(str, Enum):
    """Products whose two operands get a random Hadamard transform: wgrad, or both backward products."""

    WGRAD = "wgrad"
    BOTH = "both"


class HadamardSigns(str, Enum):
    """Whether the signs of the transform are fixed, or redrawn from the seeds of a layer."""

    FIXED = "fixed"
    REDRAWN = "redrawn"


class WeightEstimator(str, Enum):
    """The derivative of the rounding of weights: one (straight-through), or that of DGE, see `kernels.nvfp4.dge`."""

    STRAIGHT_THROUGH = "straight-through"
    DGE = "dge"


class WeightsOverTime(str, Enum):
    """What happens to weights that oscillate between two numbers in 4 bits; see `WeightHistory`.

    none: nothing.
    q-ema: each is rounded to the neighbor that is nearer to its running average (arXiv 2502.20853).
    q-ramping: the more one oscillates, the more gradients it averages for an update (arXiv 2502.20853).
    reset: it is set to its rounded value, which is the center of its bin (arXiv 2510.27527).
    """

    NONE = "none"
    Q_EMA = "q-ema"
    Q_RAMPING = "q-ramping"
    RESET = "reset"


RAMPING_STEPS = 30
"""Number of steps of a measurement for Q-Ramping, as in its paper."""


@dataclass(frozen=True)
class TrainingRecipe:
    """Rounding of the operands. Each setting is a part of its own; `docs/nvfp4.md` lists their sources.

    inputs, weights: rules for rounding to nearest. Gradients that are rounded to NVFP4 always use `static6`, which
        stochastic rounding keeps unbiased.
    tiles: whether weights have tiles of 16 x 16, so that both passes use one rounding; otherwise each pass rounds along
        the dimension that it sums over.
    backward_operands: source of the weights and inputs of the backward products.
    gradients: rounding of gradients.
    hadamard_points: number of points of the Hadamard transform, 16, 64 or 128; 0 for no transform.
    hadamard_products: products that are transformed.
    hadamard_signs: signs of the transform.
    estimator: derivative of the rounding of weights.
    outlier_quantile: quantile of the magnitudes of the inputs, in (0, 1], at which they are clamped before they are
        rounded. What exceeds it is multiplied in 16 bits, in the forward product and in wgrad.
    weights_over_time: what happens to oscillating weights. The ratio R of a weight is the path of its rounding divided
        by its own path over the steps of a measurement.
    average_decay: decay of the running average of `q-ema` for each step.
    measure_oscillation: whether the share of weights with R >= `oscillation_bound` is measured where nothing needs it.
    oscillation_every: number of steps between the ends of two measurements, the first of which is after the warm-up of
        the learning rate.
    oscillation_steps: number of steps of a measurement; None for 30 with `q-ramping`, and all of them otherwise.
    oscillation_bound: ratio R from which on `reset` resets a weight.
    ramping_unit, ramping_gain, ramping_most: k1, k2 and N_max of `q-ramping`, which averages
        min(k2 floor(R / k1) + 1, N_max) gradients. The paper gives no number for N_max.
    Raises ValueError for settings out of range and for parts that exclude each other.
    """

    inputs: Rule = Rule.ADAPTIVE
    weights: Rule = Rule.STATIC6
    tiles: bool = True
    backward_operands: BackwardOperands = BackwardOperands.ORIGINALS
    gradients: GradientRounding = GradientRounding.STOCHASTIC
    hadamard_points: int = 16
    hadamard_products: HadamardProducts = HadamardProducts.WGRAD
    hadamard_signs: HadamardSigns = HadamardSigns.FIXED
    estimator: WeightEstimator = WeightEstimator.STRAIGHT_THROUGH
    outlier_quantile: float = 1.0
    weights_over_time: WeightsOverTime = WeightsOverTime.NONE
    average_decay: float = 0.998
    measure_oscillation: bool = False
    oscillation_every: int = 200
    oscillation_steps: int | None = None
    oscillation_bound: float = 4.0
    ramping_unit: float = 16.0
    ramping_gain: int = 5
    ramping_most: int = 16

    def __post_init__(self) -> None:
        if self.hadamard_points not in (0, *HADAMARD_POINTS):
            raise ValueError(f"hadamard_points={self.hadamard_points}; expected 0 or one of {HADAMARD_POINTS}")
        if not 0 < self.outlier_quantile <= 1:
            raise ValueError(f"outlier_quantile={self.outlier_quantile}; expected a share in (0, 1]")
        if self.gradients is GradientRounding.MS_EDEN:
            self._check_ms_eden()
        self._check_weights_over_time()

    @property
    def measures_oscillation(self) -> bool:
        """Whether the paths of weights are measured."""
        needed = self.weights_over_time in (WeightsOverTime.Q_RAMPING, WeightsOverTime.RESET)
        return needed or self.measure_oscillation

    @property
    def follows_weights(self) -> bool:
        """Whether weights have states besides those of the optimizer."""
        return self.measures_oscillation or self.weights_over_time is WeightsOverTime.Q_EMA

    @property
    def measured_steps(self) -> int:
        """Number of steps of a measurement of oscillation."""
        if self.oscillation_steps is not None:
            return self.oscillation_steps
        is_ramping = self.weights_over_time is WeightsOverTime.Q_RAMPING
        return RAMPING_STEPS if is_ramping else self.oscillation_every

    def _check_weights_over_time(self) -> None:
        if not 0 <= self.average_decay < 1:
            raise ValueError(f"average_decay={self.average_decay}; expected a number from 0 to below 1")
        for name in ("oscillation_every", "oscillation_bound", "ramping_unit", "ramping_gain", "ramping_most"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}; expected a number above 0")
        # Q-Ramping needs steps after a measurement, in which it acts
        most = self.oscillation_every - (self.weights_over_time is WeightsOverTime.Q_RAMPING)
        if self.measures_oscillation and not 0 < self.measured_steps <= most:
            raise ValueError(
                f"oscillation_steps={self.measured_steps}; expected 1 to {most} with"
                f" weights_over_time={self.weights_over_time.value} and oscillation_every={self.oscillation_every}"
            )

    def _check_ms_eden(self) -> None:
        reason = "is unbiased only after a transform of 128 points of both backward products with redrawn signs"
        if self.hadamard_signs is HadamardSigns.FIXED:
            raise ValueError(f"gradients=ms-eden {reason}; use hadamard_signs=redrawn, not fixed")
        if self.hadamard_points != ms_eden.POINTS:
            raise ValueError(f"gradients=ms-eden {reason}; use hadamard_points=128, not {self.hadamard_points}")
        if self.hadamard_products is not HadamardProducts.BOTH:
            raise ValueError(f"gradients=ms-eden {reason}; use hadamard_products=both, not wgrad")

    def encode(self) -> str:
        """Return the recipe as a string, which an operator of torch can take as an argument."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    @functools.cache
    def decode(encoded: str) -> TrainingRecipe:
        """Return the recipe that `encode` turned into this string."""
        settings = json.loads(encoded)
        for name, kind in ENUMERATIONS.items():
            settings[name] = kind(settings[name])
        return TrainingRecipe(**settings)


ENUMERATIONS = {
    "inputs": Rule,
    "weights": Rule,
    "backward_operands": BackwardOperands,
    "gradients": GradientRounding,
    "hadamard_products": HadamardProducts,
    "hadamard_signs": HadamardSigns,
    "estimator": WeightEstimator,
    "weights_over_time": WeightsOverTime,
}
"""Settings of a recipe that are not plain numbers, and their types."""
