"""LoRA weights on disk, in the namings of peft and of diffusers, and their sum with the weights they belong to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from longvideo.checkpoint import names
from longvideo.checkpoint.tensors import open_weights, read_json, save_weights, write_json
from longvideo.errors import CheckpointError
from longvideo.kernels.nvfp4 import reference
from longvideo.model.transformer import CausalTransformer
from longvideo.quantization.linear import NVFP4Linear

PEFT_STEM, PEFT_CONFIG, PEFT_PREFIX = "adapter_model", "adapter_config.json", "base_model.model."
DIFFUSERS_STEM, DIFFUSERS_PREFIX = "pytorch_lora_weights", "transformer."
DOWN, UP = ".lora_A", ".lora_B"


@dataclass(frozen=True)
class Adapter:
    """Low-rank updates of a transformer's layers.

    weights: `blocks.0.self_attn.q.lora_A` [rank, in] and `.lora_B` [out, rank], under official names. scaling: what an
    update B @ A counts.
    """

    weights: Mapping[str, Tensor]
    rank: int
    scaling: float

    @property
    def layers(self) -> list[str]:
        return [name.removesuffix(DOWN) for name in self.weights if name.endswith(DOWN)]

    def save(self, folder: Path, *, base: str) -> None:
        """Write a folder that `peft.PeftModel.from_pretrained` reads, and beside it the file that diffusers reads.

        base: name of the model it belongs to. Diffusers' naming has no place for a scaling, so it is in those weights.
        """
        peft = {f"{PEFT_PREFIX}{name}.weight": x for name, x in self.weights.items()}
        save_weights(folder, PEFT_STEM, peft, dtype=torch.float32)
        config = {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": base,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.scaling * self.rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted(self.layers),
        }
        write_json(folder / PEFT_CONFIG, config)
        diffusers = {
            _diffusers_name(name): x * self.scaling if name.endswith(UP) else x for name, x in self.weights.items()
        }
        save_weights(folder, DIFFUSERS_STEM, diffusers, dtype=torch.float32)

    @classmethod
    def load(cls, folder: Path) -> Adapter:
        """Read what `save` or peft wrote. Raises CheckpointError, naming the file, where it is no LoRA."""
        config = read_json(folder / PEFT_CONFIG)
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if config.get("peft_type") != "LORA" or not isinstance(rank, int) or not isinstance(alpha, (int, float)):
            raise CheckpointError(f"{folder / PEFT_CONFIG} describes no LoRA adapter with r and lora_alpha")
        stored = open_weights(folder, stem=PEFT_STEM)
        weights = {}
        for name in stored.infos:
            bare = name.removeprefix(PEFT_PREFIX).removesuffix(".weight")
            if not bare.endswith((DOWN, UP)):
                raise CheckpointError(f"{stored.label}: {name} is no low-rank weight")
            weights[bare] = stored.read(name, torch.device("cpu")).float()
        return cls(weights, rank, alpha / rank)

    def check_fits(self, sizes: Mapping[str, tuple[int, int]], model: str, adapter: str) -> None:
        """Raise CheckpointError unless every update is of a layer of the model and of its size.

        sizes: [out, in] of the layers that an adapter can be of.
        """
        for layer in self.layers:
            if layer not in sizes:
                raise CheckpointError(f"{adapter} updates {layer}, which {model} has not; it belongs to another model")
            rows, columns = sizes[layer]
            found = tuple(self.weights[layer + UP].shape), tuple(self.weights[layer + DOWN].shape)
            if found != ((rows, self.rank), (self.rank, columns)):
                raise CheckpointError(
                    f"{adapter}: {layer} has updates {list(found[0])} x {list(found[1])}, wanted"
                    f" {[rows, self.rank]} x {[self.rank, columns]} for {model} at rank {self.rank}"
                )


@torch.no_grad()
def merge(
    model: CausalTransformer, adapter: Adapter, *, on_layer: Callable[[str], None] = lambda name: None
) -> CausalTransformer:
    """Add an adapter to a transformer's weights, in place; packed layers become what they stand for, and no longer are.

    Sums are made in fp32 and rounded once to the weights' dtype.
    """
    for layer in adapter.layers:
        linear = model.get_submodule(layer)
        if isinstance(linear, NVFP4Linear):
            linear = _unpacked(linear, model.patch_embedding.weight.dtype)
            model.set_submodule(layer, linear)
        assert isinstance(linear, nn.Linear)
        weight = linear.weight
        down, up = (adapter.weights[layer + part].to(weight.device, torch.float32) for part in (DOWN, UP))
        weight.copy_(weight.float() + adapter.scaling * (up @ down))
        on_layer(layer)
    return model


def layer_sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return [out, in] of the linear layers inside the blocks; the model may be on the meta device."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if name.startswith("blocks.") and isinstance(module, nn.Linear | NVFP4Linear)
    }


def _unpacked(packed: NVFP4Linear, dtype: torch.dtype) -> nn.Linear:
    weight = reference.dequantize(packed.quantized_weight).to(dtype)
    linear = nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if packed.bias is not None:
        linear.bias = nn.Parameter(packed.bias.to(dtype), requires_grad=False)
    return linear


def _diffusers_name(name: str) -> str:
    layer, _, part = name.rpartition(".")
    return f"{DIFFUSERS_PREFIX}{names.to_diffusers(f'{layer}.weight').removesuffix('.weight')}.{part}.weight"
