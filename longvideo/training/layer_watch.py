"""Numbers of every layer that trains in 4 bits in one step: norms of gradients, underflow, largest magnitudes."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.quantization.training.recipe import TrainingRecipe
from longvideo.quantization.training.underflow import gradient_underflow, input_underflow

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

    from longvideo.distributed import Mesh
    from longvideo.quantization.training.linear import NVFP4TrainingLinear

LARGEST = ("input_amax", "weight_amax", "gradient_amax")
UNDERFLOW = ("input_underflow", "gradient_underflow")
GRADIENT_NORM = "gradient_norm"


class LayerWatch:
    """Measures the passes of a step inside `watching`, through hooks that no other step has.

    Input and gradient are those of the layer's output, over all passes and ranks. Underflow is the share of values that
    become zero in 4 bits. The gradient norm is that of the whole step's gradient of the weight, before it is clipped.

    layers: layers by the names of their weights.
    """

    def __init__(self, layers: Mapping[str, NVFP4TrainingLinear]) -> None:
        self.layers = dict(layers)
        self.is_on = False
        self._largest: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}

    @contextmanager
    def watching(self) -> Generator[None]:
        """Measure the step that runs inside the block, which must not be compiled."""
        for name, layer in self.layers.items():
            self._largest[name] = torch.zeros(len(LARGEST), device=layer.weight.device)
            self._counts[name] = torch.zeros(2, len(UNDERFLOW), device=layer.weight.device)
        handles = [layer.register_forward_hook(self._hook(name)) for name, layer in self.layers.items()]
        self.is_on = True
        try:
            yield
        finally:
            self.is_on = False
            for handle in handles:
                handle.remove()

    def add_gradients(self, gradient: Callable[[str], Tensor | None]) -> None:
        """Note the norms of the gradients of a step. gradient: whole gradient of a parameter by name."""
        for name in self.layers if self.is_on else ():
            value = gradient(name)
            self._norms[name] = torch.zeros(()) if value is None else torch.linalg.vector_norm(value.float())

    def values(self, mesh: Mesh) -> dict[str, float]:
        """Return the numbers of the last watched step. Every rank calls it; the host waits for the device once."""
        largest = mesh.largest_on_device(torch.stack(list(self._largest.values())))
        counts = mesh.sum(torch.stack(list(self._counts.values())))
        shares = counts[:, 0] / counts[:, 1].clamp_min(1)
        norms = torch.stack([self._norms[name].to(largest.device) for name in self.layers])
        rows = torch.cat((norms[:, None], largest, shares), dim=1).tolist()
        kinds = (GRADIENT_NORM, *LARGEST, *UNDERFLOW)
        return {
            f"layers/{name.removesuffix('.weight')}/{kind}": value
            for name, row in zip(self.layers, rows, strict=True)
            for kind, value in zip(kinds, row, strict=True)
        }

    def _hook(self, name: str) -> Callable[[NVFP4TrainingLinear, tuple[Tensor], Tensor], None]:
        def forward(layer: NVFP4TrainingLinear, inputs: tuple[Tensor], output: Tensor) -> None:
            recipe = TrainingRecipe.decode(layer.encoded_recipe)
            x = inputs[0].detach().flatten(0, -2).to(output.dtype)
            self._note(name, 0, x, input_underflow(recipe, x))
            weight = layer.weight.detach().abs().amax().float()
            self._largest[name][1] = torch.maximum(self._largest[name][1], weight)
            if output.requires_grad:
                output.register_hook(lambda grad: backward(recipe, layer, grad.detach().flatten(0, -2)))

        def backward(recipe: TrainingRecipe, layer: NVFP4TrainingLinear, grad: Tensor) -> None:
            self._note(name, 1, grad, gradient_underflow(recipe, layer.seeds, grad))

        return forward

    def _note(self, name: str, place: int, x: Tensor, underflow: Tensor) -> None:
        """Add the values of a pass: of the input at place 0, of the gradient at place 1."""
        largest = self._largest[name]
        largest[2 * place] = torch.maximum(largest[2 * place], x.abs().amax().float())
        self._counts[name][0, place] += underflow
        self._counts[name][1, place] += x.numel()
