"""`torch.compile` leaves the kernels of this package alone."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from typing import Any

import pytest
import torch

from longvideo import kernels
from longvideo.kernels.nvfp4.format import Rule
from longvideo.model.transformer import Block
from longvideo.quantization.compilation import LAYERS, leave_kernels_alone
from longvideo.quantization.convert import with_precision
from longvideo.quantization.products import choose_w4a4
from longvideo.quantization.straight_through import train_packed
from tests.quantization import small

triton = pytest.importorskip("triton")


@pytest.mark.parametrize("kind", ["packed", "trained"])
def test_nothing_of_a_layer_is_traced(kind: str) -> None:
    leave_kernels_alone()
    leave_kernels_alone()  # a second time changes nothing
    model = small.model()
    if kind == "packed":
        model = with_precision(model, "nvfp4")
    else:
        train_packed(model, choose_w4a4(torch.device("cpu"), Rule.ADAPTIVE))
    block = model.blocks[0]
    assert isinstance(block, Block)
    layer = block.self_attn.o
    x = torch.randn(2, 32, model.config.dim, generator=torch.Generator().manual_seed(0))
    traced: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, _inputs: list[Any]) -> Any:
        traced.append(graph)
        return graph.forward

    compiled = torch.compile(lambda value: layer(value * 2) + 1, backend=record)
    assert torch.equal(compiled(x), layer(x * 2) + 1)
    names = [str(node.target) for graph in traced for node in graph.graph.nodes if node.op.startswith("call")]
    # the multiplication before the layer and the addition after it, and nothing of the layer
    assert len(names) == 2 and "mul" in names[0] and "add" in names[1]
    assert isinstance(layer, LAYERS)


def test_constants_of_kernels_can_be_written_out() -> None:
    """Tools that compile a kernel again write its constants as source."""
    checked = 0
    for module in pkgutil.walk_packages(kernels.__path__, kernels.__name__ + "."):
        if ".triton" not in module.name:
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, triton.language.constexpr):
                assert ast.literal_eval(repr(value.value)) == value.value, f"{module.name}.{name}"
                checked += 1
    assert checked > 10
