"""NVFP4 training layers of TransformerEngine: random Hadamard, stochastic rounding and 2-D weights, fused on Blackwell.

TransformerEngine is imported only where it is used, since a broken installation raises more than ImportError. The layer
is `te.Linear`, run inside `autocast(recipe(...))`. All names are public ones of TransformerEngine 2.9 or newer. Version
2.20 has the adaptive rules, 2.16 has not.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from longvideo.kernels.nvfp4.format import Rule
from longvideo.kernels.nvfp4.scaled_mm import missing_hardware

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

INSTALL = "pip install 'longvideo[te]'"
FOUR_OVER_SIX = {Rule.ADAPTIVE: "MSE", Rule.ADAPTIVE_ABS: "MAE"}


def unavailable(device: torch.device) -> str | None:
    """Return why TransformerEngine's NVFP4 cannot run on a device; None if it can."""
    try:
        import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError, OSError, AssertionError) as error:
        message = str(error).partition("\n")[0]
        return f"transformer_engine cannot be imported ({type(error).__name__}: {message}); {INSTALL}"
    missing = missing_hardware(device)
    if missing is not None:
        return missing
    available, reason = te.is_nvfp4_available(return_reason=True)
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


def autocast(nvfp4_recipe: Any) -> AbstractContextManager[None]:
    """Return a context in which layers of `build_linear` multiply in NVFP4; outside it they multiply in their dtype."""
    import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]

    return te.autocast(enabled=True, recipe=nvfp4_recipe)


def build_linear(
    in_features: int, out_features: int, *, bias: bool, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> nn.Module:
    """Return a `te.Linear` with weight [out_features, in_features] in dtype, to be run under `autocast`.

    It quantizes its operands in both passes. The number of input rows and both sizes must be multiples of 16, since
    every operand is also quantized along its other dimension for the backward pass.
    Raises ValueError with the reason where it cannot run, and for other sizes.
    """
    _check(in_features, out_features, device)
    import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]

    return te.Linear(in_features, out_features, bias=bias, params_dtype=dtype, device=device)


def training_linear(linear: nn.Linear, nvfp4_recipe: Any) -> nn.Module:
    """Return a `te.Linear` with the parameters of a layer, which multiplies in NVFP4 while its `rounds` is True.

    It enters `autocast` itself, so that a pass that is recomputed for its gradient does the same. Raises the errors of
    `build_linear`.
    """
    device = linear.weight.device
    _check(linear.in_features, linear.out_features, device)
    import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]

    class RoundingLinear(te.Linear):
        rounds = True

        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            with te.autocast(enabled=self.rounds, recipe=nvfp4_recipe):
                return super().forward(*args, **kwargs)

    has_bias, dtype = linear.bias is not None, linear.weight.dtype
    layer = RoundingLinear(linear.in_features, linear.out_features, bias=has_bias, params_dtype=dtype, device=device)
    layer.weight = linear.weight
    if has_bias:
        layer.bias = linear.bias
    return layer


def _check(in_features: int, out_features: int, device: torch.device) -> None:
    if in_features % 16 or out_features % 16:
        raise ValueError(f"the layer is {out_features} x {in_features}; expected multiples of 16 for NVFP4")
    missing = unavailable(device)
    if missing is not None:
        raise ValueError(f"the te backend cannot run on {str(device)!r}: {missing}")
