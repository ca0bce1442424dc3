"""Time every NVFP4 kernel against the time that its bytes need, after comparing it with its definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.infer.bench.timing import copy_bandwidth, median_ms
from longvideo.kernels import backends
from longvideo.kernels.kv_dequant import reference as kv_reference
from longvideo.kernels.kv_dequant.format import QuantizedSlots
from longvideo.kernels.nvfp4 import reference
from longvideo.kernels.nvfp4.format import GROUP, NVFP4Tensor, Rule

if TYPE_CHECKING:
    from longvideo.model.config import TransformerConfig
    from longvideo.model.spec import ChunkSpec

CODE_BYTES = 0.5 + 1 / GROUP
"""Bytes of a 4-bit code and its share of a scale."""
INPUT_BYTES = 2 * 2
"""Bytes read for each bf16 value to quantize. It is read twice, because codes depend on the largest magnitude of the
tensor, and the second-level cache does not hold the tensor until that is known."""


class KernelMismatch(RuntimeError):
    """The result of a kernel differs from its definition, so the kernel is not timed."""


@dataclass(frozen=True)
class KernelTiming:
    """Time of a kernel.

    needed_bytes: bytes that any implementation reads and writes at least, where a tensor to quantize is read twice.
    floor_ms: time that these bytes need at the copy bandwidth.
    """

    kernel: str
    size: str
    ms: float
    needed_bytes: int
    floor_ms: float

    @property
    def share(self) -> float:
        """Fraction of the copy bandwidth that the kernel reaches."""
        return self.floor_ms / self.ms


@dataclass(frozen=True)
class _Case:
    """A kernel to time. run: calls it. differing: returns the number of values that differ from the definition."""

    kernel: str
    size: str
    needed_bytes: float
    run: Callable[[], object]
    differing: Callable[[], int]


def time_kernels(
    config: TransformerConfig, spec: ChunkSpec, *, device: torch.device
) -> tuple[float, list[KernelTiming]]:
    """Return the copy bandwidth in bytes per second, and the time of each kernel at the shapes of a model.

    Raises KernelMismatch, before timing it, for a kernel whose bits differ from its definition; for kernels that first
    normalize or apply GELU, up to 1 % of the codes may differ.
    """
    bandwidth = copy_bandwidth(device)
    timings = []
    for case in _cases(config, spec, device):
        if (differing := case.differing()) > 0:
            raise KernelMismatch(f"{case.kernel} {case.size}: {differing} values differ from the definition")
        floor_ms = 1000 * case.needed_bytes / bandwidth
        ms = median_ms(case.run, device, captured=True)
        timings.append(KernelTiming(case.kernel, case.size, ms, int(case.needed_bytes), floor_ms))
    return bandwidth, timings


def _cases(config: TransformerConfig, spec: ChunkSpec, device: torch.device) -> Iterator[_Case]:
    operations = backends.nvfp4_operations(device)
    rows, scale = spec.tokens_per_chunk, torch.tensor(0.01, device=device)
    for columns in (config.dim, config.ffn_dim):
        x = _activations(rows, columns, device)
        size = f"{rows} x {columns}"
        for rule in (Rule.STATIC6, Rule.ADAPTIVE):

            def packed(x: Tensor = x, rule: Rule = rule) -> NVFP4Tensor:
                return operations.quantize(x, rule)

            def written(x: Tensor = x, rule: Rule = rule) -> Tensor:
                return operations.quantize_exact(x, rule, dtype=x.dtype).values

            yield _Case(
                f"quantize {rule.value}",
                size,
                x.numel() * (INPUT_BYTES + CODE_BYTES),
                packed,
                lambda packed=packed, x=x, rule=rule: _differing_codes(packed(), reference.quantize(x, rule)),
            )
            yield _Case(
                f"quantize {rule.value}, written out",
                size,
                x.numel() * (INPUT_BYTES + 2),
                written,
                lambda written=written, x=x, rule=rule: _differing(
                    written(), reference.quantize_exact(x, rule, dtype=x.dtype).values
                ),
            )
        bias = torch.linspace(-1, 1, columns, device=device, dtype=x.dtype)
        yield _Case(
            "scale and bias",
            size,
            x.numel() * 4,
            lambda x=x, bias=bias: operations.add_scaled_bias(x, scale, bias),
            lambda x=x, bias=bias: _differing(
                operations.add_scaled_bias(x.clone(), scale, bias), reference.add_scaled_bias(x, scale, bias)
            ),
        )
    yield from _prologue_cases(config, spec, device)
    weight = reference.quantize(_activations(config.ffn_dim, config.dim, device))
    for name, work, definition in (
        ("dequantize a weight", operations.dequantize, reference.dequantize),
        (
            "write out a weight",
            lambda w, dtype: operations.exact(w, dtype).values,
            lambda w, dtype: reference.exact(w, dtype).values,
        ),
    ):
        yield _Case(
            name,
            f"{config.ffn_dim} x {config.dim}",
            config.ffn_dim * config.dim * (2 + CODE_BYTES),
            lambda work=work: work(weight, torch.bfloat16),
            lambda work=work, definition=definition: _differing(
                work(weight, torch.bfloat16), definition(weight, torch.bfloat16)
            ),
        )
    yield from _training_cases(config, spec, device)
    yield from _cache_cases(config, spec, device)


def _training_cases(config: TransformerConfig, spec: ChunkSpec, device: torch.device) -> Iterator[_Case]:
    operations = backends.nvfp4_operations(device)
    weight = _activations(config.ffn_dim, config.dim, device)

    def tiles(source: backends.NVFP4Operations) -> Tensor:
        return source.quantize_tiles_exact(weight, Rule.STATIC6, dtype=weight.dtype).values

    yield _Case(
        "quantize in tiles, written out",
        f"{config.ffn_dim} x {config.dim}",
        weight.numel() * (INPUT_BYTES + 2),
        lambda: tiles(operations),
        lambda: _differing(tiles(operations), tiles(reference)),
    )
    for columns in (config.dim, config.ffn_dim):
        x = _activations(spec.tokens_per_chunk, columns, device)

        def across(source: backends.NVFP4Operations, x: Tensor = x) -> NVFP4Tensor:
            return source.quantize_across(x, Rule.ADAPTIVE, hadamard=True)

        yield _Case(
            "transform and quantize across rows",
            f"{spec.tokens_per_chunk} x {columns}",
            x.numel() * (INPUT_BYTES + CODE_BYTES),
            lambda across=across: across(operations),
            lambda across=across: _differing_codes(across(operations), across(reference)),
        )


def _prologue_cases(config: TransformerConfig, spec: ChunkSpec, device: torch.device) -> Iterator[_Case]:
    operations = backends.nvfp4_operations(device)
    rows, frames = spec.tokens_per_chunk, spec.chunk_frames
    h = _activations(rows, config.dim, device).unsqueeze(0)
    shift, scale = torch.randn(2, 1, frames, 1, config.dim, device=device).unbind(0)
    wide = _activations(rows, config.ffn_dim, device)

    def normalized(source: backends.NVFP4Operations) -> NVFP4Tensor:
        return source.layer_norm_modulate_quantize(h, shift, scale, eps=config.eps)

    yield _Case(
        "normalize, modulate, quantize",
        f"{rows} x {config.dim}",
        h.numel() * (INPUT_BYTES + CODE_BYTES),
        lambda: normalized(operations),
        lambda: _mostly_equal(normalized(operations), normalized(reference)),
    )
    yield _Case(
        "GELU, quantize",
        f"{rows} x {config.ffn_dim}",
        wide.numel() * (INPUT_BYTES + CODE_BYTES),
        lambda: operations.gelu_tanh_quantize(wide),
        lambda: _mostly_equal(operations.gelu_tanh_quantize(wide), reference.gelu_tanh_quantize(wide)),
    )


def _cache_cases(config: TransformerConfig, spec: ChunkSpec, device: torch.device) -> Iterator[_Case]:
    operations = backends.kv_operations(device)
    heads, head_dim, tokens, num_slots = (
        config.num_attention_heads,
        config.attention_head_dim,
        spec.tokens_per_chunk,
        spec.window_chunks,
    )
    slots, expected = (
        QuantizedSlots.allocate(slots=num_slots, batch=1, tokens=tokens, heads=heads, head_dim=head_dim, device=device)
        for _ in range(2)
    )
    keys, values = _activations(2 * tokens * heads, head_dim, device).view(2, 1, tokens, heads, head_dim)
    for slot in range(num_slots):
        kv_reference.write_slot(slots, slot, keys * (slot + 1), values)
        kv_reference.write_slot(expected, slot, keys * (slot + 1), values)
    numbers = 2 * tokens * heads * head_dim
    yield _Case(
        "quantize keys and values of a chunk",
        f"{tokens} x {heads} x {head_dim}",
        numbers * (INPUT_BYTES + CODE_BYTES),
        lambda: operations.write_slot(slots, 0, keys, values),
        lambda: _differing(_after(operations.write_slot, slots, keys, values), expected.codes),
    )
    shape = (1, num_slots, tokens, heads, head_dim)
    workspace = [torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in range(4)]
    angle = torch.rand(num_slots, tokens, head_dim // 2, device=device) * 6.3
    cos, sin = angle.cos(), angle.sin()
    for count in (num_slots - 1, num_slots):
        which = torch.arange(count, dtype=torch.int32, device=device)

        def rebuild(which: Tensor = which) -> Tensor:
            operations.rebuild(slots, which, cos, sin, workspace[0], workspace[1])
            return torch.stack(workspace[:2])

        def defined(which: Tensor = which) -> Tensor:
            kv_reference.rebuild(slots, which, cos, sin, workspace[2], workspace[3])
            return torch.stack(workspace[2:])

        yield _Case(
            "rebuild keys and values of a layer",
            f"{count} of {num_slots} chunks",
            count * numbers * (2 + CODE_BYTES),
            lambda which=which: operations.rebuild(slots, which, cos, sin, workspace[0], workspace[1]),
            lambda rebuild=rebuild, defined=defined: _differing(rebuild(), defined()),
        )


def _after(write_slot: Callable[..., None], slots: QuantizedSlots, keys: Tensor, values: Tensor) -> Tensor:
    for slot in range(slots.codes.shape[1]):
        write_slot(slots, slot, keys * (slot + 1), values)
    return slots.codes


def _activations(rows: int, columns: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(rows, columns, generator=generator, device=device, dtype=torch.float32).bfloat16()


def _mostly_equal(result: NVFP4Tensor, expected: NVFP4Tensor) -> int:
    """Return how many bytes of codes differ beyond 1 %: sums and functions in float32 depend on the implementation."""
    return max(0, _differing(result.codes, expected.codes) - expected.codes.numel() // 100)


def _differing_codes(result: NVFP4Tensor, expected: NVFP4Tensor) -> int:
    return _differing(result.codes, expected.codes) + _differing(
        result.scales.view(torch.uint8), expected.scales.view(torch.uint8)
    )


def _differing(result: Tensor, expected: Tensor) -> int:
    return int((result != expected).sum())
