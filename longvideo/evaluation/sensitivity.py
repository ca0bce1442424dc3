"""Measure where the error of NVFP4 comes from: some layers of a model in NVFP4, and the effect on its velocities.

Latents, noise and context come from a roll-out of the unchanged model, and every pass is repeated on the same inputs,
so the effect of one group of layers contains no other. An effect is the norm of the velocities' differences over the
norm of the velocities, over all prompts and chunks; with guidance, over both copies of a sample. It has two parts: that
of the steps, with the layers in NVFP4 while the context is exact; and that of the clean pass, with the layers in NVFP4
there while the steps are exact, which later chunks see in the keys and values of their context. The parts are added as
independent errors are, by their squares.
"""

from __future__ import annotations

import math
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from longvideo.evaluation.quantization import ErrorTally
from longvideo.evaluation.replay import Recording, record, replay
from longvideo.kernels.backends import NVFP4Operations, nvfp4_operations
from longvideo.quantization.linear import NVFP4Linear
from longvideo.quantization.products import W4A16, EmulatedW4A4
from longvideo.quantization.selection import layers_to_quantize

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence
    from typing import Any

    from longvideo.checkpoint.settings import ModelSettings
    from longvideo.model.spec import ChunkSpec
    from longvideo.model.transformer import CausalTransformer

Operands = Literal["weights", "inputs", "both"]
Grouping = Literal["kinds", "blocks", "layers"]
OPERANDS: tuple[Operands, ...] = ("weights", "inputs", "both")
GROUPINGS: tuple[Grouping, ...] = ("kinds", "blocks", "layers")


@dataclass(frozen=True)
class LayerGroup:
    """Linear layers that are in NVFP4 together. by: a grouping, or "model" for all layers and for all but some."""

    by: str
    name: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Variant:
    """A group of layers, and which operands of their products are in NVFP4."""

    group: LayerGroup
    operands: Operands


@dataclass(frozen=True)
class Effect:
    """The effect of a variant on the velocities, as relative errors.

    share: share of the layers in the multiply-adds of all linear layers of the blocks. by_step: effect in each step of
    the solver. steps: the same over all steps. clean_pass: effect through the context; None for roll-outs of one chunk.
    """

    variant: Variant
    share: float
    by_step: tuple[float, ...]
    steps: float
    clean_pass: float | None

    @property
    def error(self) -> float:
        """Relative error from steps and clean passes."""
        return math.hypot(self.steps, self.clean_pass or 0.0)

    @property
    def decibels(self) -> float | None:
        """Signal-to-quantization-noise ratio of the velocities in decibels; None without an error."""
        return -20 * math.log10(self.error) if self.error else None


def layer_groups(model: CausalTransformer, by: Grouping) -> list[LayerGroup]:
    """Divide the linear layers of the blocks into groups, in the order of the model.

    Raises UserError for layers that do not fit NVFP4, as `layers_to_quantize` does.
    """
    names: dict[str, list[str]] = defaultdict(list)
    for layer in layers_to_quantize(model):
        blocks, number, kind = layer.split(".", 2)
        names[{"kinds": kind, "blocks": f"{blocks}.{number}", "layers": layer}[by]].append(layer)
    return [LayerGroup(by, name, tuple(layers)) for name, layers in names.items()]


def every_layer(model: CausalTransformer, keep: Sequence[str] = ()) -> LayerGroup:
    """Return a group of all linear layers of the blocks but some. keep: names of layers that are left out."""
    return LayerGroup("model", "all but the kept" if keep else "all", tuple(layers_to_quantize(model, keep)))


def choose_kept(effects: Iterable[Effect], budget: float) -> list[Effect]:
    """Choose layers to keep in their own precision: those whose error is largest for their multiply-adds.

    effects: of single layers, with the same operands. budget: largest share of the multiply-adds of the chosen layers.
    Returns their effects, most sensitive first. A layer that does not fit in the rest of the budget is left out.
    """
    kept: list[Effect] = []
    for effect in sorted(effects, key=lambda effect: effect.error**2 / effect.share, reverse=True):
        if math.fsum(other.share for other in (*kept, effect)) <= budget:
            kept.append(effect)
    return kept


class RoundedInputLinear(nn.Module):
    """A linear layer with its input in NVFP4 and its weight as it is."""

    def __init__(self, linear: nn.Linear, operations: NVFP4Operations) -> None:
        super().__init__()
        self.linear = linear
        self._operations, self._product = operations, EmulatedW4A4(operations)

    def forward(self, x: Tensor) -> Tensor:
        operand = self._product.prepare(x)
        product = F.linear(operand.values, self.linear.weight)
        return self._operations.add_scaled_bias(product, operand.tensor_scale, self.linear.bias)


def rounded_layer(linear: nn.Linear, operands: Operands, *, name: str = "weight") -> nn.Module:
    """Return a linear layer with operands in NVFP4 under the rule `adaptive`. name: name of the weight in errors."""
    operations = nvfp4_operations(linear.weight.device)
    if operands == "inputs":
        return RoundedInputLinear(linear, operations)
    packed = NVFP4Linear.from_linear(linear, name=name)
    packed.set_product(W4A16(operations) if operands == "weights" else EmulatedW4A4(operations))
    return packed


@dataclass(frozen=True)
class SensitivityReport:
    """The result of a measurement.

    sigmas: noise level of each step, as the model receives it. kept: names of layers to keep in their own precision,
    most sensitive first; empty if single layers were not measured. If there are any, the last of `effects` is that of
    all other layers in NVFP4.
    """

    sigmas: tuple[float, ...]
    effects: tuple[Effect, ...]
    kept: tuple[str, ...]


@dataclass
class _Tallies:
    by_step: dict[int, ErrorTally] = field(default_factory=lambda: defaultdict(ErrorTally))
    steps: ErrorTally = field(default_factory=ErrorTally)
    clean_pass: ErrorTally = field(default_factory=ErrorTally)


class SensitivityMeasurement:
    """Recorded roll-outs of a model, on which variants are measured.

    settings: steps, shift, guidance and clean pass of the roll-outs. features: for each video, output of the text
    encoder for its prompt and, in the last row, the negative prompt. seeds: seed of the noise of each video.
    """

    def __init__(
        self,
        model: CausalTransformer,
        spec: ChunkSpec,
        settings: ModelSettings,
        *,
        features: Sequence[Tensor],
        seeds: Sequence[int],
        num_chunks: int,
    ) -> None:
        self._model, self._spec = model, spec
        self._layers: dict[tuple[str, Operands], nn.Module] = {}
        with _counted(model) as self._multiply_adds:
            self._recordings = [
                record(model, spec, settings, features_PJD=own, num_chunks=num_chunks, seed=seed)
                for own, seed in zip(features, seeds, strict=True)
            ]

    def measure(
        self, variants: Sequence[Variant], *, budget: float, on_variant: Callable[[], None] = lambda: None
    ) -> SensitivityReport:
        """Measure the effect of each variant. on_variant: function that is called after each.

        With variants of single layers, layers to keep are chosen by those of the last variant's operands. budget:
        largest share of the multiply-adds of these layers.
        """
        effects = []
        for variant in variants:
            effects.append(self._effect(variant))
            on_variant()
        operands = variants[-1].operands
        singles = (effect for effect in effects if effect.variant.group.by == "layers")
        chosen = choose_kept((effect for effect in singles if effect.variant.operands == operands), budget)
        kept = tuple(effect.variant.group.name for effect in chosen)
        if kept:
            effects.append(self._effect(Variant(every_layer(self._model, kept), operands)))
        steps = self._recordings[0].chunks[0].steps
        sigmas = tuple(float(step.sigma_BT.max()) for step in steps)
        return SensitivityReport(sigmas, tuple(effects), kept)

    def _effect(self, variant: Variant) -> Effect:
        layers = {name: self._rounded(name, variant.operands) for name in variant.group.layers}
        tallies = _Tallies()
        for recording in self._recordings:
            for velocities, chunk in zip(self._replay(recording, in_steps=layers), recording.chunks, strict=True):
                for number, (velocity, step) in enumerate(zip(velocities, chunk.steps, strict=True)):
                    tallies.by_step[number].add(velocity, step.velocity_BCTHW)
                    tallies.steps.add(velocity, step.velocity_BCTHW)
            if len(recording.chunks) == 1:
                continue
            # the first chunk has no context
            rows = list(zip(self._replay(recording, in_clean_pass=layers), recording.chunks, strict=True))[1:]
            for velocities, chunk in rows:
                for velocity, step in zip(velocities, chunk.steps, strict=True):
                    tallies.clean_pass.add(velocity, step.velocity_BCTHW)
        return Effect(
            variant,
            share=sum(self._multiply_adds[name] for name in layers) / sum(self._multiply_adds.values()),
            by_step=tuple(tally.relative_error for _, tally in sorted(tallies.by_step.items())),
            steps=tallies.steps.relative_error,
            clean_pass=tallies.clean_pass.relative_error if tallies.clean_pass.signal else None,
        )

    def _replay(
        self,
        recording: Recording,
        *,
        in_steps: dict[str, nn.Module] | None = None,
        in_clean_pass: dict[str, nn.Module] | None = None,
    ) -> list[list[Tensor]]:
        return replay(self._model, self._spec, recording, in_steps=in_steps or {}, in_clean_pass=in_clean_pass or {})

    def _rounded(self, name: str, operands: Operands) -> nn.Module:
        if (name, operands) not in self._layers:
            linear = self._model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            self._layers[name, operands] = rounded_layer(linear, operands, name=f"{name}.weight")
        return self._layers[name, operands]


@contextmanager
def _counted(model: CausalTransformer) -> Generator[dict[str, int]]:
    """Count the multiply-adds of every linear layer of the blocks inside a block of code."""
    counts = dict.fromkeys(layers_to_quantize(model), 0)

    def hook(name: str, layer: nn.Linear) -> Callable[..., None]:
        def count(_module: nn.Module, inputs: tuple[Any, ...], _output: Tensor) -> None:
            counts[name] += inputs[0].numel() * layer.out_features

        return count

    handles = []
    for name in counts:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        handles.append(layer.register_forward_hook(hook(name, layer)))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
