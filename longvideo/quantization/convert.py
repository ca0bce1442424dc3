"""Replacement of the linear layers of a transformer by quantized ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from longvideo.errors import UserError
from longvideo.kernels.backends import nvfp4_operations, product_backend
from longvideo.kernels.nvfp4.format import GROUP, Rule
from longvideo.model.transformer import Block, CausalTransformer, ModulatedNorm
from longvideo.quantization.fp8 import quantize_layers_fp8
from longvideo.quantization.linear import CODES, NVFP4Linear, RoundedGELU, RoundedInput, RoundedModulatedNorm
from longvideo.quantization.number_formats import FP8_FORMATS
from longvideo.quantization.products import W4A4, W4A16, Product, choose_w4a4
from longvideo.quantization.selection import layers_to_quantize

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch

    from longvideo.kernels.backends import TransformerPrecision
    from longvideo.kernels.fp8.format import FP8Rows


def quantize_layers(
    model: CausalTransformer,
    rule: Rule = Rule.ADAPTIVE,
    *,
    keep: Sequence[str] = (),
    device: torch.device | None = None,
    on_layer: Callable[[str, nn.Linear, NVFP4Linear], None] = lambda _name, _old, _new: None,
) -> list[str]:
    """Replace linear layers by packed ones in place and return their names.

    rule: rule for the scales of groups.
    keep: patterns of layers that are not replaced, see `layers_to_quantize`.
    device: device to which each layer is moved before it is packed; None leaves it where it is.
    on_layer: function that is called with the name, the layer and the packed layer, for progress and errors.
    Raises the errors of `layers_to_quantize`, and ValueError for NaN or infinity in a weight.
    """
    names = layers_to_quantize(model, keep)
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        packed = NVFP4Linear.from_linear(linear.to(device), rule, name=f"{name}.weight")
        model.set_submodule(name, packed)
        on_layer(name, linear, packed)
    return names


def expect_packed(model: CausalTransformer, tensor_names: Iterable[str]) -> list[str]:
    """Replace the layers for which a checkpoint holds codes by packed ones on the meta device; return their names."""
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
    """Set the product of the packed layers. If it rounds inputs, the modules before the layers do so, once."""
    for module in model.modules():
        if isinstance(module, NVFP4Linear):
            module.set_product(product)
    set_inputs(model, product if isinstance(product, W4A4) else None)


def with_precision(
    transformer: CausalTransformer,
    precision: TransformerPrecision,
    *,
    packed: bool = False,
    device: torch.device | None = None,
    stored: Callable[[str], FP8Rows | None] = lambda _name: None,
) -> CausalTransformer:
    """Return a transformer with the products of a precision; its layers are replaced in place.

    packed: whether its layers hold 4-bit weights already. device: device where it will run, to which its layers are
    moved one after another, so that the device never holds more than one unquantized layer; None means where it is.
    stored: as of `quantize_layers_fp8`.
    Raises UserError where the device has no such products, and for FP8 with packed layers.
    """
    device = device or transformer.patch_embedding.weight.device
    backend = product_backend(precision, device)
    if backend.name is None:
        raise UserError(str(backend.reason))
    if precision in FP8_FORMATS:
        quantize_layers_fp8(transformer, device=device, stored=stored)
    elif precision != "bf16" and not packed:
        quantize_layers(transformer, device=device)
    transformer.to(device)
    if precision == "nvfp4-weights":
        set_product(transformer, W4A16(nvfp4_operations(device)))
    elif precision in ("nvfp4", "nvfp4-te"):
        set_product(transformer, choose_w4a4(device, backend="te" if precision == "nvfp4-te" else None))
    return transformer


def set_inputs(model: CausalTransformer, product: W4A4 | None) -> None:
    """Set whether norms and GELUs round inputs that only packed layers without a branch read.

    q, k and v then share one rounded input.

    product: product whose rounding is used; None removes the rounding. A layer with an unrounded input rounds it
        itself, so no result changes.
    """

    def rounding_of(*readers: nn.Module) -> W4A4 | None:
        rounds = all(isinstance(reader, NVFP4Linear) and reader.branch is None for reader in readers)
        return product if rounds else None

    eps = model.config.eps
    for block in model.modules():
        if not isinstance(block, Block):
            continue
        own, cross, ffn = block.self_attn, block.cross_attn, block.ffn
        before = rounding_of(own.q, own.k, own.v)
        block.norm1 = RoundedModulatedNorm(eps, before) if before else ModulatedNorm(model.config.dim, eps)
        before = rounding_of(ffn[0])
        block.norm2 = RoundedModulatedNorm(eps, before) if before else ModulatedNorm(model.config.dim, eps)
        before = rounding_of(ffn[2])
        ffn[1] = RoundedGELU(before) if before else nn.GELU(approximate="tanh")
        before = rounding_of(cross.k, cross.v)
        cross.shared_input = RoundedInput(before) if before else nn.Identity()
