"""Recipes of TransformerEngine for training in FP8: inputs and weights in E4M3, gradients in E5M2.

Delayed scaling does not use TransformerEngine's own histories: they move at the end of every region of `autocast`, so a
layer that is recomputed for its gradient would round by another scale than before. The caller sets the scales instead.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from longvideo.kernels import te
from longvideo.kernels.fp8.scaled_mm import missing_fp8_units

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OPERANDS = ("input", "weight", "grad_output")
"""TransformerEngine's names of the operands that are rounded, in the order of the rows of scales and magnitudes."""
GRADIENT = OPERANDS.index("grad_output")


def unavailable(device: torch.device) -> str | None:
    """Return why TransformerEngine's FP8 cannot run on a device; None if it can."""
    if missing := missing_fp8_units(device, "FP8 products", "use bf16 for them"):
        return missing
    if missing := te.missing_package():
        return missing
    import transformer_engine.pytorch as engine  # pyright: ignore[reportMissingImports]

    available, reason = engine.is_fp8_available(return_reason=True)
    return None if available else f"TransformerEngine has no FP8 here: {reason}"


def current_recipe() -> Any:
    """Return the recipe by which a tensor's scale follows from its own largest magnitude."""
    from transformer_engine.common.recipe import Float8CurrentScaling  # pyright: ignore[reportMissingImports]

    # given, since TransformerEngine takes them from environment variables otherwise
    settings = {"use_power_2_scales": False, "backward_override": None}
    known = {field.name for field in dataclasses.fields(Float8CurrentScaling)}
    return Float8CurrentScaling(**{name: value for name, value in settings.items() if name in known})


def recipe_by_scales(scales: Tensor, amaxes: Tensor) -> Any:
    """Return the recipe by which the operands of a layer are multiplied by given scales and then rounded.

    scales: factors of the input, the weight and the gradient, float32 [3], read in every pass.
    amaxes: float32 [3, 1]; every pass raises them to the largest magnitudes of its operands.
    """
    from transformer_engine.common.recipe import CustomRecipe  # pyright: ignore[reportMissingImports]
    from transformer_engine.pytorch import DType, Float8Quantizer  # pyright: ignore[reportMissingImports]

    def quantizer(role: Any) -> Any:
        name = None if role is None else role.tensor_type
        if name not in OPERANDS:  # of results in FP8, which no layer here has
            return Float8Quantizer(scales.new_ones(()), amaxes.new_zeros(1), DType.kFloat8E4M3)
        row = OPERANDS.index(name)
        dtype = DType.kFloat8E5M2 if row == GRADIENT else DType.kFloat8E4M3
        return Float8Quantizer(scales[row], amaxes[row], dtype)

    return CustomRecipe(qfactory=quantizer)
