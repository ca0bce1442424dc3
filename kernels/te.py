"""TransformerEngine: whether it can be imported, and its linear layer with the parameters of another one.

It is imported only where it is used, since a broken installation raises more than ImportError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import nn

INSTALL = "pip install 'longvideo[te]'"


def missing_package() -> str | None:
    """Return why TransformerEngine cannot be imported; None if it can."""
    try:
        import transformer_engine.pytorch  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]
    except (ImportError, RuntimeError, OSError, AssertionError) as error:
        message = str(error).partition("\n")[0]
        return f"transformer_engine cannot be imported ({type(error).__name__}: {message}); {INSTALL}"
    return None


def outdated() -> str | None:
    """Return why the installed version does not take scales and operands of the caller; None if it does."""
    from transformer_engine.pytorch import quantization  # pyright: ignore[reportMissingImports]

    if hasattr(quantization, "QuantizerRole"):
        return None
    return "the installed TransformerEngine does not take scales of the caller; install 2.20 or newer"


def linear_of(linear: nn.Linear) -> nn.Module:
    """Return a `te.Linear` with the parameters of a layer and without memory of its own, to be run under `autocast`."""
    import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]

    has_bias, dtype = linear.bias is not None, linear.weight.dtype
    layer = te.Linear(linear.in_features, linear.out_features, bias=has_bias, params_dtype=dtype, device="meta")
    layer.weight = linear.weight
    if has_bias:
        layer.bias = linear.bias
    return layer


def autocast(recipe: Any) -> AbstractContextManager[None]:
    """Return a context in which a `te.Linear` multiplies by a recipe; outside it, it multiplies in its dtype."""
    import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]

    return te.autocast(enabled=True, recipe=recipe)
