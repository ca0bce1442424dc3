"""Linear layers that train in NVFP4: all three products of a step have 4-bit operands, emulated without FP4 units.

The default recipe is that of "Pretraining Large Language Models with NVFP4" (arXiv 2509.25149, section 4): weights in
16 x 16 tiles, so that forward and backward see the same rounding; gradients rounded stochastically; a random Hadamard
transform on both operands of the weight gradient. The master weight is not rounded; each operand is rounded from it.

Shapes: M tokens, I inputs, O outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from longvideo.kernels.nvfp4.format import GROUP, check_groups
from longvideo.kernels.nvfp4.hadamard import HADAMARD_POINTS
from longvideo.quantization.training.operators import product
from longvideo.quantization.training.phase import TrainingPhase

if TYPE_CHECKING:
    from longvideo.quantization.training.recipe import TrainingRecipe


LARGEST_TRANSFORM = max(HADAMARD_POINTS)


class NVFP4TrainingLinear(nn.Linear):
    """`nn.Linear` with NVFP4 operands in the forward product and in both backward products.

    seeds: seeds of the random numbers of a step, int64 [2] on the device of the layer, one for each backward product;
        their owner changes them between steps.
    phase: passes whose operands are rounded; in `TrainingPhase.NEITHER` the layer is a plain `nn.Linear`.
    Under autocast, inputs are rounded to its dtype first, as in every linear layer, but weights are not.
    Raises ValueError unless inputs and outputs, along which the products sum, are multiples of 16.
    """

    seeds: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        recipe: TrainingRecipe,
        seeds: Tensor,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        check_groups(torch.Size((out_features, in_features)), tile_rows=GROUP)
        self.encoded_recipe = recipe.encode()
        self.phase = TrainingPhase.BOTH
        # a buffer, since a CUDA graph reads it at its address
        self.register_buffer("seeds", seeds, persistent=False)
        # not a buffer, since those of a model in bf16 are cast
        self.average = torch.empty(0, device=seeds.device)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, recipe: TrainingRecipe, seeds: Tensor) -> NVFP4TrainingLinear:
        """Return a layer that shares the parameters of another one."""
        bias = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, bias, recipe=recipe, seeds=seeds, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer

    def round_toward(self, average: Tensor) -> None:
        """Round weights to the neighbor that is nearer to this average, float32, whose owner changes it in place."""
        self.average = average

    def forward(self, input: Tensor) -> Tensor:
        if self.phase is TrainingPhase.NEITHER:
            return super().forward(input)
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        keep = self.weight.requires_grad and torch.is_grad_enabled()
        rounds = self.phase is TrainingPhase.BOTH
        flat = product(input.flatten(0, -2), self.weight, self.average, self.seeds, self.encoded_recipe, rounds, keep)[
            0
        ]
        output = flat.unflatten(0, input.shape[:-1])
        return output if self.bias is None else output + self.bias.to(output.dtype)


@torch.inference_mode(False)
@torch.enable_grad()
def make_constants(recipe: TrainingRecipe, device: torch.device) -> None:
    """Run both passes of a small layer once, so that the tables that operations keep exist.

    If one were made while a CUDA graph is recorded, its memory would be part of the graph, which torch refuses.
    """
    layer = NVFP4TrainingLinear(
        LARGEST_TRANSFORM,
        LARGEST_TRANSFORM,
        recipe=recipe,
        seeds=torch.zeros(2, dtype=torch.int64, device=device),
        device=device,
    )
    for dtype in (torch.float32, torch.bfloat16):
        layer(torch.ones(LARGEST_TRANSFORM, LARGEST_TRANSFORM, dtype=dtype, device=device)).sum().backward()
