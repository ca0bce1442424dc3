"""LoRA on a transformer's linear layers, packed or not, through peft."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from longvideo.quantization.branch import add_low_rank
from longvideo.quantization.convert import set_inputs
from longvideo.quantization.linear import NVFP4Linear

if TYPE_CHECKING:
    from longvideo.model.transformer import CausalTransformer

TARGETS = ("q", "k", "v", "o", "ffn.0", "ffn.2")
"""Ends of the names of all linear layers of the blocks."""


class LoraLinear(nn.Module, LoraLayer):
    """A frozen layer with low-rank updates (LoRA, arXiv 2106.09685; on 4-bit weights, QeRL, arXiv 2510.11696).

    An update is not merged in place, since rounding would remove it from a packed layer; `longvideo merge` adds it to
    the unpacked weights.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
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
                down, up = self.lora_A[name].weight, self.lora_B[name].weight
                assert isinstance(down, Tensor) and isinstance(up, Tensor)
                output = add_low_rank(output, self.lora_dropout[name](x), down, up, scale=self.scaling[name])
        return output

    def merge(self, *_args: Any, **_kwargs: Any) -> None:
        raise ValueError("a LoRA update is not merged in place; use `longvideo merge`, then `longvideo quantize`")

    def unmerge(self) -> None:
        raise ValueError("no LoRA update is merged, so none can be removed")


def add_lora(model: CausalTransformer, config: LoraConfig, *, adapter_name: str = "default") -> PeftModel:
    """Add an adapter to the layers of a transformer; everything else is frozen.

    Layers that share an input then round it separately, since the adapters need it unrounded.
    """
    config._register_custom_module({NVFP4Linear: LoraLinear, nn.Linear: LoraLinear})  # pyright: ignore[reportPrivateUsage]
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Unsupported layer type .*NVFP4Linear"
        )  # the layer has the two sizes that peft reads
        adapted = PeftModel(model, config, adapter_name=adapter_name)
    set_inputs(model, None)
    return adapted
