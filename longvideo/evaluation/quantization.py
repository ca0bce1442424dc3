"""Measure the errors of 4-bit formats and rules on synthetic tensors and on tensors of a model.

A relative error is the norm of the rounding error over the norm of the tensor. A signal-to-quantization-noise ratio is
the squared inverse of this for a layer's output, in decibels. The tensors of a model come from a short rollout.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longvideo.kernels.backends import nvfp4_operations
from longvideo.kernels.nvfp4 import reference
from longvideo.kernels.nvfp4.format import Rule
from longvideo.model.cache import KVCache
from longvideo.model.conditioning import Conditioning
from longvideo.model.rope import Rope, rotate
from longvideo.quantization.convert import layers_to_quantize
from longvideo.quantization.linear import NVFP4Linear
from longvideo.quantization.products import W4A16, EmulatedW4A4, Product
from longvideo.rollout import CachedTransformer, rollout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from longvideo.flow.unipc import UniPC
    from longvideo.model.spec import ChunkSpec
    from longvideo.model.transformer import CausalTransformer
    from longvideo.text.encoder import TextEncoder

SYNTHETIC_SHAPE = (1024, 1024)
STUDENT_DEGREES = 3


def _nvfp4(x: Tensor, rule: Rule) -> Tensor:
    return reference.dequantize(reference.quantize(x.contiguous(), rule))


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "NVFP4 static6": partial(_nvfp4, rule=Rule.STATIC6),
    "NVFP4 static4": partial(_nvfp4, rule=Rule.STATIC4),
    "NVFP4 adaptive": partial(_nvfp4, rule=Rule.ADAPTIVE),
    "MXFP4": reference.quantize_dequantize_mxfp4,
}


@dataclass
class ErrorTally:
    """Sums over tensors of the squared errors and of the squared exact values."""

    error: float = 0.0
    signal: float = 0.0

    def add(self, rounded: Tensor, exact: Tensor) -> None:
        """Add a tensor."""
        self.error += float((rounded.double() - exact.double()).square().sum())
        self.signal += float(exact.double().square().sum())

    @property
    def relative_error(self) -> float:
        """Norm of the errors over the norm of the exact values."""
        return math.sqrt(self.error / self.signal)

    @property
    def decibels(self) -> float:
        """Signal-to-noise ratio in decibels."""
        return 10 * math.log10(self.signal / self.error)


@dataclass(frozen=True)
class QuantizationReport:
    """The result of a measurement.

    errors: relative errors, by tensor and format. sqnr: signal-to-quantization-noise ratios in decibels, by product,
    kind of layer, and block.
    """

    errors: dict[str, dict[str, float]]
    sqnr: dict[str, dict[str, list[float]]]


@dataclass
class _Measurement:
    errors: dict[str, dict[str, ErrorTally]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(ErrorTally))
    )
    outputs: dict[str, dict[str, ErrorTally]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(ErrorTally))
    )

    def add(self, what: str, x: Tensor) -> None:
        for name, rounded in FORMATS.items():
            self.errors[what][name].add(rounded(x.float()), x)


@torch.no_grad()
def measure_quantization(
    transformer: CausalTransformer,
    text_encoder: TextEncoder,
    *,
    spec: ChunkSpec,
    solver: UniPC,
    prompts: list[str],
    seed: int = 0,
) -> QuantizationReport:
    """Measure errors on synthetic tensors, on the weights, and on the activations of one chunk for each prompt.

    seed: of the synthetic tensors and of the noise.
    """
    measured = _Measurement()
    for what, x in _synthetic(seed).items():
        measured.add(what, x)
    layers = {name: transformer.get_submodule(name) for name in layers_to_quantize(transformer)}
    hooks = []
    for name, layer in layers.items():
        assert isinstance(layer, nn.Linear)
        measured.add("weights", layer.weight)
        hooks.append(layer.register_forward_hook(_output_hook(measured, name, layer)))
    try:
        _roll_out(transformer, text_encoder, spec, solver, prompts, seed, _recording_cache(measured))
    finally:
        for hook in hooks:
            hook.remove()
    errors = {
        what: {name: tally.relative_error for name, tally in rows.items()} for what, rows in measured.errors.items()
    }
    sqnr: dict[str, dict[str, list[float]]] = {}
    for product, rows in measured.outputs.items():
        for name, tally in rows.items():
            kind = name.split(".", 2)[2]
            sqnr.setdefault(product, {}).setdefault(kind, []).append(tally.decibels)
    return QuantizationReport(errors, sqnr)


def _synthetic(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gaussian, denominator = (torch.randn(SYNTHETIC_SHAPE, generator=generator) for _ in range(2))
    # a normal variable over the root of the mean of three squared ones has Student's t with three degrees of freedom
    squares = [torch.randn(SYNTHETIC_SHAPE, generator=generator).square() for _ in range(STUDENT_DEGREES)]
    return {
        "Gaussian": gaussian,
        "heavy-tailed (Student t, 3 degrees)": denominator / (sum(squares) / STUDENT_DEGREES) ** 0.5,
    }


def _output_hook(measured: _Measurement, name: str, layer: nn.Linear) -> Callable[..., None]:
    weight = NVFP4Linear.from_linear(layer).quantized_weight
    operations = nvfp4_operations(layer.weight.device)
    products: dict[str, Product] = {"W4A16": W4A16(operations), "W4A4": EmulatedW4A4(operations)}

    def hook(_module: nn.Module, inputs: tuple[Any, ...], _output: Tensor) -> None:
        measured.add("inputs of linear layers", inputs[0])
        exact = nn.functional.linear(inputs[0].float(), layer.weight.float(), _float(layer.bias))
        for label, product in products.items():
            rounded = product(inputs[0].float(), weight, layer.bias)
            measured.outputs[label][name].add(rounded, exact)

    return hook


def _recording_cache(measured: _Measurement) -> type[KVCache]:
    class RecordingCache(KVCache):
        def keep(self, layer: int, keys_BLNK: Tensor, values_BLNK: Tensor, rope: Rope) -> None:
            keys = keys_BLNK.float()
            mean = keys.mean(1, keepdim=True)
            rotated = rotate(keys, rope)
            rotated_mean = rotated.mean(1, keepdim=True)
            measured.add("values", values_BLNK)
            for what, x, shift in (
                ("keys before RoPE", keys, None),
                ("keys before RoPE, smoothed", keys, mean),
                ("keys after RoPE", rotated, None),
                ("keys after RoPE, smoothed", rotated, rotated_mean),
            ):
                for name, rounded in FORMATS.items():
                    result = rounded(x) if shift is None else rounded(x - shift) + shift
                    measured.errors[what][name].add(result, x)
            super().keep(layer, keys_BLNK, values_BLNK, rope)

    return RecordingCache


def _roll_out(
    transformer: CausalTransformer,
    text_encoder: TextEncoder,
    spec: ChunkSpec,
    solver: UniPC,
    prompts: list[str],
    seed: int,
    cache_type: type[KVCache],
) -> None:
    features_PLD, rows_P = text_encoder.encode(prompts)
    text = transformer.encode_text(features_PLD)
    # the clean pass of a chunk runs when the next one is requested, so the last prompt is used twice
    rows = (*rows_P.split(1), rows_P[-1:])
    conditionings: Iterable[Conditioning] = (Conditioning(text=text, prompt_index=row, cut=True) for row in rows)
    generators = [torch.Generator().manual_seed(seed)]
    denoiser = CachedTransformer(transformer, spec, batch=1, cache_type=cache_type)
    for _ in rollout(denoiser, conditionings, solver=solver, generators=generators):
        pass


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()


def as_markdown(report: QuantizationReport) -> str:
    """Return both tables: errors in percent, and output noise in decibels with the lowest of all blocks in brackets."""
    lines = [_row("relative error", *FORMATS), _row("---", *("---" for _ in FORMATS))]
    lines += [_row(what, *(f"{row[name]:.2%}" for name in FORMATS)) for what, row in report.errors.items()]
    products = list(report.sqnr)
    lines += ["", _row("output SQNR", *products), _row("---", *("---" for _ in products))]
    for kind in report.sqnr[products[0]]:
        values = [report.sqnr[product][kind] for product in products]
        lines.append(_row(kind, *(f"{sum(row) / len(row):.1f} dB ({min(row):.1f})" for row in values)))
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
