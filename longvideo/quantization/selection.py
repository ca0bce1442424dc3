"""Names of the linear layers to quantize."""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn

from longvideo.errors import UserError
from longvideo.files import read_lines
from longvideo.kernels.nvfp4.format import GROUP
from longvideo.quantization.linear import NVFP4Linear

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from longvideo.model.transformer import CausalTransformer

BLOCKS = "blocks."


def linear_layers(model: CausalTransformer) -> list[str]:
    """Return the names of the linear layers of the blocks."""
    return [name for name, module in model.named_modules() if name.startswith(BLOCKS) and _is_linear(module)]


def layers_to_quantize(model: CausalTransformer, keep: Sequence[str] = ()) -> list[str]:
    """Return the names of the linear layers of the blocks, without those that a pattern keeps.

    keep: patterns of official module names, in which `*` stands for anything: "blocks.0.*", "*.ffn.2".
    Raises UserError for a pattern that matches no layer, and for a layer with inputs that are not a multiple of 16.
    """
    kept = set(matching_layers(model, keep, what="keep"))
    chosen = [name for name in linear_layers(model) if name not in kept]
    for name in chosen:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear | NVFP4Linear)
        if layer.in_features % GROUP:
            raise UserError(
                f"{name} has {layer.in_features} inputs; expected a multiple of {GROUP}; keep it with keep={name!r}"
            )
    return chosen


def matching_layers(model: CausalTransformer, patterns: Sequence[str], *, what: str) -> list[str]:
    """Return the names of the linear layers of the blocks that a pattern names, in the model's order.

    what: name of the setting in errors. Raises UserError for a pattern that matches no layer.
    """
    names = linear_layers(model)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"layers are named like {names[0]!r}"
            raise UserError(f"{what} pattern {pattern!r} matches no linear layer of the blocks; {hint}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def read_keep_file(path: Path) -> list[str]:
    """Read patterns of layers that are not quantized, one in each line. Raises UserError for an empty line."""
    lines = read_lines(path, what="file of layers to keep")
    if lines[-1] == "":
        lines.pop()  # the last line ends with a line break
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise UserError(f"{path}:{number} is empty; expected the name of a layer")
    return [line.strip() for line in lines]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | NVFP4Linear)
