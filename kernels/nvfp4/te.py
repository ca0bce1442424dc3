"""NVFP4 through TransformerEngine: random Hadamard, stochastic rounding and 2-D weights, fused on Blackwell.

For training, a layer is `te.Linear`, run inside `kernels.te.autocast(recipe(...))`. Version 2.20 of TransformerEngine
has the adaptive rules, 2.16 has not. For inference, `matmul` multiplies operands that this project rounds.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from longvideo.kernels import te
from longvideo.kernels.nvfp4.codes import SWIZZLE_ROWS
from longvideo.kernels.nvfp4.format import E2M1_MAX, E4M3_MAX, Rule
from longvideo.kernels.nvfp4.scaled_mm import missing_hardware

if TYPE_CHECKING:
    from torch import Tensor

    from longvideo.kernels.nvfp4.scaled_mm import ScaledOperand

LARGEST = E2M1_MAX * E4M3_MAX
"""Magnitude of a tensor with the scale 1 in TransformerEngine."""
FOUR_OVER_SIX = {Rule.ADAPTIVE: "MSE", Rule.ADAPTIVE_ABS: "MAE"}


def unavailable(device: torch.device) -> str | None:
    """Return why TransformerEngine's NVFP4 cannot run on a device; None if it can."""
    if missing := te.missing_package() or missing_hardware(device):
        return missing
    import transformer_engine.pytorch as engine  # pyright: ignore[reportMissingImports]

    available, reason = engine.is_nvfp4_available(return_reason=True)
    return None if available else f"TransformerEngine has no NVFP4 here: {reason}"


def recipe(
    rule: Rule = Rule.STATIC6, *, stochastic_gradients: bool = True, hadamard: bool = True, tiled_weights: bool = True
) -> Any:
    """Return the `NVFP4BlockScaling` recipe for these settings.

    rule: rule for weights and activations; gradients always use static6.
    stochastic_gradients: whether gradients are rounded stochastically.
    hadamard: whether both operands of the weight gradient are transformed.
    tiled_weights: whether 16 x 16 weights share one scale.
    Raises ValueError for static4 and adaptive-max, which TransformerEngine does not have, for an adaptive rule with the
    Hadamard transform, which it refuses, and where the installed version has no 4over6.
    """
    if rule is not Rule.STATIC6 and rule not in FOUR_OVER_SIX:
        known = ", ".join(known.value for known in (Rule.STATIC6, *FOUR_OVER_SIX))
        raise ValueError(f"TransformerEngine has no rule {rule.value!r}; use one of {known}")
    if rule.is_adaptive and hadamard:
        raise ValueError(
            f"TransformerEngine cannot combine rule {rule.value!r} with the Hadamard transform; "
            "use static6 or hadamard=False"
        )
    from transformer_engine.common.recipe import NVFP4BlockScaling  # pyright: ignore[reportMissingImports]

    settings: dict[str, bool | str] = {
        "disable_rht": not hadamard,
        "disable_stochastic_rounding": not stochastic_gradients,
        "disable_2d_quantization": not tiled_weights,
    }
    # every known setting is given, since TransformerEngine takes the others from environment variables
    if "nvfp4_4over6" in {field.name for field in dataclasses.fields(NVFP4BlockScaling)}:
        settings["nvfp4_4over6"] = "all" if rule.is_adaptive else "none"
        settings["nvfp4_4over6_e4m3_use_256"] = "all"
        settings["nvfp4_4over6_err_mode"] = FOUR_OVER_SIX.get(rule, "MAE")
        settings["row_scaled_activation"] = False
    elif rule.is_adaptive:
        raise ValueError(
            f"the installed TransformerEngine has no 4over6, which rule {rule.value!r} needs; install 2.20 or"
            " newer, or use static6"
        )
    return NVFP4BlockScaling(**settings)


def product_unavailable(device: torch.device) -> str | None:
    """Return why `matmul` cannot run on a device; None if it can."""
    return unavailable(device) or te.outdated()


def matmul(a: ScaledOperand, b: ScaledOperand, bias: Tensor | None = None) -> Tensor:
    """Multiply a [M, K] by the transpose of b [N, K] and add a bias [N], in bfloat16: [M, N].

    The operands are those of `scaled_mm.matmul`, whose bytes TransformerEngine reads too. The bias is rounded to
    bfloat16, and added before the result is rounded. There is no backward pass.
    """
    from transformer_engine.pytorch.cpp_extensions import general_gemm  # pyright: ignore[reportMissingImports]

    rounded = None if bias is None else bias.to(torch.bfloat16)
    output, *_ = general_gemm(_storage(b), _storage(a), out_dtype=torch.bfloat16, layout="TN", bias=rounded)
    return output


def _storage(operand: ScaledOperand) -> Any:
    """Return an operand as TransformerEngine holds it: the scale of a tensor is given by its largest magnitude."""
    from transformer_engine.pytorch import DType, NVFP4TensorStorage  # pyright: ignore[reportMissingImports]

    rows = -(-operand.packed.shape[0] // SWIZZLE_ROWS) * SWIZZLE_ROWS
    return NVFP4TensorStorage(
        rowwise_data=operand.packed.view(torch.uint8),
        rowwise_scale_inv=operand.scales.view(torch.uint8).view(rows, -1),
        columnwise_data=None,
        columnwise_scale_inv=None,
        amax_rowwise=(operand.tensor_scale * LARGEST).reshape(1),
        amax_columnwise=None,
        fp4_dtype=DType.kFloat4E2M1,
        quantizer=None,
        with_gemm_swizzled_scales=True,
    )
