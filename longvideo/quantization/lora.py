"""LoRA on packed layers, through peft."""

from __future__ import annotations

import warnings
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from longvideo.model.transformer import CausalTransformer
from longvideo.quantization.convert import set_inputs
from longvideo.quantization.linear import NVFP4Linear


class NVFP4LoraLinear(nn.Module, LoraLayer):
    """A frozen packed layer plus low-rank updates (LoRA, arXiv 2106.09685; on 4-bit weights, QeRL, arXiv 2510.11696).

    Adapters compute in float32 or in the dtype of their weights. Merging is refused: it would round the update away.
    """

    def __init__(self, base_layer: NVFP4Linear, adapter_name: str, config: LoraConfig, **kwargs: Any):
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = False
        self._active_adapter = adapter_name
        self.update_layer(
            adapter_name,
            r=kwargs.get("r", config.r),
            lora_alpha=kwargs.get("lora_alpha", config.lora_alpha),
            config=config,
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return output
        for name in self.active_adapters:
            if name in self.lora_A:
                down, up = self.lora_A[name], self.lora_B[name]
                assert isinstance(down, nn.Linear)
                update = up(down(self.lora_dropout[name](x.to(down.weight.dtype)))) * self.scaling[name]
                output = output + update.to(output.dtype)
        return output

    def merge(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "a LoRA update cannot be merged into packed 4-bit weights; merge into bf16 ones, then quantise"
        )

    def unmerge(self) -> None:
        raise ValueError("nothing is merged: packed 4-bit weights take no LoRA update")


def add_lora(model: CausalTransformer, config: LoraConfig) -> PeftModel:
    """Put adapters on a transformer's layers, packed ones included; everything else is frozen.

    Layers that read one input then round it each for itself, since the adapters want it unrounded.
    """
    config._register_custom_module({NVFP4Linear: NVFP4LoraLinear})
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Unsupported layer type .*NVFP4Linear"
        )  # it has the two sizes peft wants
        adapted = PeftModel(model, config)
    set_inputs(model, None)
    return adapted
