"""NVFP4 training layers by TransformerEngine: random Hadamard, stochastic rounding and 2-D weights fused on Blackwell.

TransformerEngine is imported where it is used and nowhere else, since a half-installed one raises far more than
ImportError. The layer is `te.Linear`, run inside `autocast(recipe(...))`; all names are TransformerEngine's public
ones, of 2.9 or newer; 2.20 knows the adaptive rules, 2.16 does not.
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
    """Return the reason why TransformerEngine's NVFP4 cannot run on a device, None if it can."""
    try:
        import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError, OSError, AssertionError) as error:
        found = str(error).partition("\n")[0]
        return f"transformer_engine cannot be imported ({type(error).__name__}: {found}); {INSTALL}"
    missing = missing_hardware(device)
    if missing is not None:
        return missing
    available, reason = te.is_nvfp4_available(return_reason=True)
    return None if available else f"TransformerEngine has no NVFP4 here: {reason}"


def recipe(
    rule: Rule = Rule.STATIC6, *, stochastic_gradients: bool = True, hadamard: bool = True, tiled_weights: bool = True
) -> Any:
    """Return the `NVFP4BlockScaling` recipe for our settings.

    rule: of weights and activations; gradients are always static6. stochastic_gradients: round those stochastically.
    hadamard: rotate both operands of the weight gradient. tiled_weights: one scale for 16 x 16 weights.
    Raises ValueError for static4 and adaptive-max, which TransformerEngine does not know, for an adaptive rule with the
    Hadamard transform, which it refuses, and where the installed version has no 4over6.
    """
    if rule is not Rule.STATIC6 and rule not in FOUR_OVER_SIX:
        known = [known.value for known in (Rule.STATIC6, *FOUR_OVER_SIX)]
        raise ValueError(f"TransformerEngine has no rule {rule.value!r}; choose one of {known}")
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
    # all that is known is named, since unnamed settings come from environment variables
    if "nvfp4_4over6" in {field.name for field in dataclasses.fields(NVFP4BlockScaling)}:
        settings["nvfp4_4over6"] = "all" if rule.is_adaptive else "none"
        settings["nvfp4_4over6_e4m3_use_256"] = "all"
        settings["nvfp4_4over6_err_mode"] = FOUR_OVER_SIX.get(rule, "MAE")
        settings["row_scaled_activation"] = False
    elif rule.is_adaptive:
        raise ValueError(f"the installed TransformerEngine has no 4over6, rule {rule.value!r} needs 2.20 or newer")
    return NVFP4BlockScaling(**settings)


def autocast(nvfp4_recipe: Any) -> AbstractContextManager[None]:
    """Return the context in which layers of `build_linear` multiply in NVFP4; outside of it they do in their dtype."""
    import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]

    return te.autocast(enabled=True, recipe=nvfp4_recipe)


def build_linear(
    in_features: int, out_features: int, *, bias: bool, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> nn.Module:
    """Return a `te.Linear` with weight [out_features, in_features] in dtype, to be run under `autocast`.

    It quantises by itself, in both passes. The number of rows it is given must be a multiple of 16, as must be both
    sizes, since every operand is also quantised along its other dimension for the backward pass.
    Raises ValueError with what is missing where it cannot run, and for other sizes.
    """
    _check(in_features, out_features, device)
    import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]

    return te.Linear(in_features, out_features, bias=bias, params_dtype=dtype, device=device)


def training_linear(linear: nn.Linear, nvfp4_recipe: Any) -> nn.Module:
    """Return a `te.Linear` that takes over a layer's parameters and multiplies in NVFP4 where its `rounds` is True.

    It enters `autocast` itself, so that a pass that is recomputed for its gradient does so too. Raises as
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
        raise ValueError(f"NVFP4 needs sizes that 16 divides, got {out_features} x {in_features}")
    missing = unavailable(device)
    if missing is not None:
        raise ValueError(f"the te backend cannot run on {str(device)!r}: {missing}")
