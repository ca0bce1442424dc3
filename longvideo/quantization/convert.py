"""Turn a transformer's linear layers into packed ones, all but those that are to stay as they are."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from longvideo.errors import UserError
from longvideo.kernels.nvfp4.format import GROUP, Rule
from longvideo.model.transformer import Block, CausalTransformer, ModulatedNorm
from longvideo.quantization.linear import CODES, NVFP4Linear, RoundedGELU, RoundedInput, RoundedModulatedNorm
from longvideo.quantization.products import W4A4, Product
from longvideo.quantization.training import NVFP4TrainingLinear, RoundingSeeds, TrainingRecipe

BLOCKS = "blocks."


def layers_to_quantize(model: CausalTransformer, keep: Sequence[str] = ()) -> list[str]:
    """Name the linear layers inside the blocks, less those that a pattern keeps.

    keep: official module names, `*` standing for anything: "blocks.0.*", "*.ffn.2". Raises UserError for a pattern that
    names no layer, and for a layer whose input 16 does not divide.
    """
    names = [name for name, module in model.named_modules() if name.startswith(BLOCKS) and _is_linear(module)]
    for pattern in keep:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"layers are named like {names[0]!r}"
            raise UserError(f"keep pattern {pattern!r} names no linear layer of the blocks; {hint}")
    chosen = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in keep)]
    for name in chosen:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear | NVFP4Linear)
        if layer.in_features % GROUP:
            raise UserError(
                f"{name} has {layer.in_features} inputs, not a multiple of {GROUP}; keep it with keep={name!r}"
            )
    return chosen


def quantize_layers(
    model: CausalTransformer,
    rule: Rule = Rule.ADAPTIVE,
    *,
    keep: Sequence[str] = (),
    on_layer: Callable[[str, nn.Linear, NVFP4Linear], None] = lambda name, old, new: None,
) -> list[str]:
    """Replace linear layers by packed ones in place and return their names.

    on_layer: called with the name, the layer and its packed form, for progress and for errors.

    Raises UserError as `layers_to_quantize` does, and ValueError for NaN or infinity in a weight.
    """
    names = layers_to_quantize(model, keep)
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        packed = NVFP4Linear.from_linear(linear, rule, name=f"{name}.weight")
        model.set_submodule(name, packed)
        on_layer(name, linear, packed)
    return names


def train_in_nvfp4(model: CausalTransformer, recipe: TrainingRecipe, *, keep: Sequence[str] = ()) -> RoundingSeeds:
    """Let linear layers train with NVFP4 products, in place, on the parameters they have; return their seeds.

    keep: as in `layers_to_quantize`; arXiv 2509.25149 keeps the first and last blocks. The model has to be on its
    device already.
    """
    names = layers_to_quantize(model, keep)
    seeds = RoundingSeeds(len(names), model.patch_embedding.weight.device)
    for name, own in zip(names, seeds.values, strict=True):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(name, NVFP4TrainingLinear.from_linear(linear, recipe=recipe, seeds=own))
    return seeds


def expect_packed(model: CausalTransformer, tensor_names: Iterable[str]) -> list[str]:
    """Replace, on the meta device, the layers for which a checkpoint holds codes; return their names."""
    suffix = f".{CODES}"
    names = [name.removesuffix(suffix) for name in tensor_names if name.endswith(suffix)]
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in names:
        if (linear := linears.get(name)) is not None and linear.in_features % GROUP == 0:
            has_bias = linear.bias is not None
            packed = NVFP4Linear(linear.in_features, linear.out_features, bias=has_bias, device="meta")
            model.set_submodule(name, packed)
    return names


def set_product(model: CausalTransformer, product: Product) -> None:
    """Say how the packed layers multiply. If inputs are rounded, that is done once, by what comes before the layers."""
    for module in model.modules():
        if isinstance(module, NVFP4Linear):
            module.set_product(product)
    set_inputs(model, product if isinstance(product, W4A4) else None)


def set_inputs(model: CausalTransformer, product: W4A4 | None) -> None:
    """Let norms and GELUs round what only packed layers read, and q, k and v share one rounded input; None: let none.

    A layer whose input is not rounded before it rounds it itself, so this changes no result.
    """

    def rounds(*readers: nn.Module) -> W4A4 | None:
        return product if all(isinstance(reader, NVFP4Linear) for reader in readers) else None

    eps = model.config.eps
    for block in model.modules():
        if not isinstance(block, Block):
            continue
        own, cross, ffn = block.self_attn, block.cross_attn, block.ffn
        before = rounds(own.q, own.k, own.v)
        block.norm1 = RoundedModulatedNorm(eps, before) if before else ModulatedNorm(model.config.dim, eps)
        before = rounds(ffn[0])
        block.norm2 = RoundedModulatedNorm(eps, before) if before else ModulatedNorm(model.config.dim, eps)
        before = rounds(ffn[2])
        ffn[1] = RoundedGELU(before) if before else nn.GELU(approximate="tanh")
        before = rounds(cross.k, cross.v)
        cross.shared_input = RoundedInput(before) if before else nn.Identity()


def is_packed(model: nn.Module) -> bool:
    """Say whether any layer of a model is packed."""
    return any(isinstance(module, NVFP4Linear) for module in model.modules())


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | NVFP4Linear)
