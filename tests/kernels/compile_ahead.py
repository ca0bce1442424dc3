"""Compile every kernel for GPUs that this machine need not have, and print the contents of the machine code as JSON.

A script, since the Triton interpreter of the tests' process and Triton's compiler exclude each other. The interpreter
accepts what the compiler rejects: types, layouts, arguments that happen to be 1. Names of kernels select some.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from longvideo.kernels.kv_dequant import triton as kv
from longvideo.kernels.nvfp4.format import Rule
from longvideo.kernels.nvfp4.triton import arithmetic, layer_norm, products, quantizing, training

HOPPER, EVERYWHERE, WITH_FP4_UNITS = (90,), (90, 100), (100, 103, 120)
BF16, FP16, FP32, U8, I32, I64 = "*bf16", "*fp16", "*fp32", "*u8", "*i32", "*i64"
ADAPTIVE = {"RULE": Rule.ADAPTIVE.value, "ADAPTIVE": True}
STATIC = {"RULE": Rule.STATIC6.value, "ADAPTIVE": False}
WARPS = quantizing.block_warps(quantizing.BLOCK_GROUPS)
DIM, HEADS = 3072, 24  # sizes of the 5B model


@dataclass(frozen=True)
class Job:
    """A kernel to compile. arguments: names of types, or constants for the compiler, in order."""

    name: str
    kernel: Any
    arguments: list[Any]
    constants: dict[str, Any]
    capabilities: tuple[int, ...] = EVERYWHERE
    num_warps: int = 4


def jobs() -> Iterator[Job]:
    yield from quantization()
    yield from layer_norms()
    yield from writing_out()
    yield from for_training()
    yield from slots()
    tile = {"BLOCK_M": products.BLOCK_M, "BLOCK_N": products.BLOCK_N, "BLOCK_K": products.BLOCK_K}
    operands = [U8, U8, FP32, U8, U8, FP32, BF16, "i32", "i32", "i32"]
    yield Job("scaled product", products._scaled_product_kernel, operands, tile, WITH_FP4_UNITS, num_warps=8)
    for name, bias in (("scaled bias", BF16), ("scale", None)):
        arguments = [BF16, FP32, bias, "i32", "i32"]
        yield Job(name, products._scaled_bias_kernel, arguments, {"BLOCK": 4096}, HOPPER, num_warps=8)


def quantization() -> Iterator[Job]:
    block = {"BLOCK": quantizing.BLOCK_GROUPS}
    plain = {"STOCHASTIC": False, "GELU": False, "EXACT": False, "PER_GROUP": False} | block
    packed = [BF16, FP32, None, I32, U8, "i32"]
    kernel = quantizing._quantize_kernel
    for rule in Rule:
        constants = plain | {"RULE": rule.value, "ADAPTIVE": rule.is_adaptive}
        capabilities = EVERYWHERE if rule in (Rule.STATIC6, Rule.ADAPTIVE) else HOPPER
        yield Job(f"quantize {rule.value}", kernel, packed, constants, capabilities, num_warps=WARPS)
    yield Job("quantize float32", kernel, [FP32, *packed[1:]], plain | ADAPTIVE, HOPPER, num_warps=WARPS)
    yield Job(
        "quantize one group",
        kernel,
        [FP16, *packed[1:-1], 1],
        plain | ADAPTIVE,
        HOPPER,
        num_warps=WARPS,
    )
    yield Job(
        "quantize per group",
        kernel,
        packed,
        plain | ADAPTIVE | {"PER_GROUP": True},
        HOPPER,
        num_warps=WARPS,
    )
    yield Job(
        "quantize exact",
        kernel,
        [BF16, FP32, None, BF16, None, "i32"],
        plain | ADAPTIVE | {"EXACT": True},
        num_warps=WARPS,
    )
    yield Job(
        "quantize stochastic",
        kernel,
        [BF16, FP32, I64, I32, U8, "i32"],
        plain | STATIC | {"STOCHASTIC": True},
        num_warps=WARPS,
    )
    yield Job("gelu quantize", kernel, packed, plain | ADAPTIVE | {"GELU": True}, num_warps=WARPS)
    for name, gelu in (("maxima", False), ("gelu maxima", True)):
        maxima = {"GELU": gelu, "BLOCK": quantizing.BLOCK_GROUPS * quantizing.MAXIMA_BLOCKS}
        yield Job(name, quantizing._maxima_kernel, [BF16, I32, "i32"], maxima, num_warps=quantizing.MAXIMA_WARPS)
    for name, count, size in (("tensor scale", "i32", quantizing.BLOCK_MAXIMA), ("tensor scale of one", 1, 1)):
        constants = {"SMALLEST_AMAX": Rule.ADAPTIVE.smallest_amax, "LARGEST_PRODUCT": Rule.ADAPTIVE.largest_product}
        constants |= {"BLOCK": size, "ROUNDS": 1 if count == 1 else 3}
        yield Job(name, quantizing._tensor_scale_kernel, [I32, FP32, FP32, count], constants, HOPPER)


def layer_norms() -> Iterator[Job]:
    inputs = [BF16, FP32, FP32, FP32]
    for per_token in (False, True):
        strides = ["i32", "i32", "i32" if per_token else 0] * 2
        row = {"DIM": DIM, "PER_TOKEN": per_token, "ROWS": layer_norm.BLOCK_ROWS, "BLOCK": 256}
        suffix, capabilities = (" per token", HOPPER) if per_token else ("", EVERYWHERE)
        arguments = [*inputs, I32, "i32", "i32", *strides, "fp32"]
        kernel = layer_norm._layer_norm_maxima_kernel
        yield Job("layer norm maxima" + suffix, kernel, arguments, row, capabilities, num_warps=8)
        for name, outputs, exact in (("quantize", [I32, U8], False), ("exact", [BF16, None], True)):
            arguments = [*inputs, FP32, *outputs, "i32", "i32", *strides]
            constants = row | ADAPTIVE | {"EXACT": exact}
            kernel = layer_norm._layer_norm_quantize_kernel
            yield Job(f"layer norm {name}{suffix}", kernel, arguments, constants, capabilities, num_warps=8)


def writing_out() -> Iterator[Job]:
    for name, scale, out in (("exact", None, BF16), ("dequantize", FP32, BF16), ("dequantize float32", FP32, FP32)):
        constants = {"SCALED": scale is not None, "PER_GROUP": False}
        constants |= {"TILES": products.BLOCK_TILES, "BLOCK": products.BLOCK_WORDS}
        yield Job(name, products._write_out_kernel, [I32, U8, scale, out, "i32"], constants)


def for_training() -> Iterator[Job]:
    columns = {"BLOCK": training.BLOCK_COLUMNS}
    warps = training._column_warps(training.BLOCK_COLUMNS)
    for suffix, hadamard in (("", False), (" transformed", True)):
        block = columns | {"HADAMARD": hadamard}
        arguments = [BF16, I32, "i32", "i32"]
        yield Job(f"maxima across{suffix}", training._maxima_across_kernel, arguments, block, HOPPER, num_warps=warps)
        for name, outputs, rounding in (
            ("across", [None, I32, U8], ADAPTIVE | {"STOCHASTIC": False, "EXACT": False}),
            ("across stochastic", [I64, BF16, None], STATIC | {"STOCHASTIC": True, "EXACT": True}),
        ):
            arguments = [BF16, FP32, *outputs, "i32", "i32", "i32"]
            yield Job(name + suffix, training._across_kernel, arguments, block | rounding, num_warps=warps)
    for rule in (Rule.STATIC6, Rule.ADAPTIVE):
        constants = {"RULE": rule.value, "ADAPTIVE": rule.is_adaptive, "TILES": training.BLOCK_TILES}
        warps = quantizing.block_warps(training.BLOCK_TILES * 16)
        arguments = [FP32, FP32, BF16, "i32"]
        yield Job(f"tiles {rule.value}", training._tiles_kernel, arguments, constants, num_warps=warps)


def slots() -> Iterator[Job]:
    channels = {"CHANNELS": DIM, "BLOCK": quantizing.BLOCK_GROUPS}
    maxima = channels | {"BLOCK": quantizing.BLOCK_GROUPS * quantizing.MAXIMA_BLOCKS}
    yield Job(
        "slot maxima", kv._maxima_kernel, [BF16, BF16, BF16, I32, "i32"], maxima, num_warps=quantizing.MAXIMA_WARPS
    )
    arguments = [BF16, BF16, BF16, FP32, I32, U8, "i32", "i32"]
    yield Job("slot write", kv._write_kernel, arguments, channels | ADAPTIVE, num_warps=WARPS)
    stored = [I32, U8, FP32, BF16, I32, FP32, FP32]
    for head_dim in (32, 64, 128):
        words = head_dim // arithmetic.WORD_CODES
        shape = {"WORDS": words, "BLOCK_TOKENS": kv.REBUILD_THREADS // words, "BLOCK_HEADS": kv.REBUILD_HEADS}
        arguments = [*stored, BF16, BF16, *["i32"] * 9]
        yield Job(f"rebuild {head_dim}", kv._rebuild_kernel, arguments, shape | {"HEADS": HEADS})
        ones = [*stored, FP32, FP32, 1, 1, 1, *["i32"] * 6]
        yield Job(f"rebuild one {head_dim}", kv._rebuild_kernel, ones, shape | {"HEADS": 3}, HOPPER)


def compile_job(job: Job, capability: int) -> str:
    """Return the PTX. Pointers and integers are declared as multiples of 16, as in a launch with real shapes."""
    names = job.kernel.arg_names
    assert set(names[len(job.arguments) :]) == set(job.constants), f"{job.name}: the kernel has {names}"
    values = dict(zip(names, job.arguments, strict=False)) | job.constants
    signature, known, attributes = {}, {}, {}
    for index, name in enumerate(names):
        if name in job.constants or not isinstance(values[name], str):
            signature[name], known[(index,)] = "constexpr", values[name]
            continue
        signature[name] = values[name]
        if values[name] != "fp32":
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(job.kernel, signature, known, attributes)
    options = {"num_warps": job.num_warps, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]


def describe(ptx: str) -> dict[str, int]:
    """Return the numbers of instructions of each kind."""
    patterns = {
        "block_scaled": r"mxf4nvf4",
        # fused on purpose: rounding to E2M1 multiplies by 2^22, exactly; the division by 0.75 computes an exact
        # remainder and corrects the quotient by it
        "fused_multiply_add": r"\bfma\.rn\.f32 (?!.*0f(?:[4C]A800000|BF400000|3FAAAAAB))",
        "flush_to_zero": r"\.ftz\.",
        "shared_memory": r"\bst\.shared",
        "vector_stores": r"\bst\.global\.v[248]",
        "scalar_stores": r"\bst\.global\.(?!v)",
    }
    return {name: len(re.findall(pattern, ptx)) for name, pattern in patterns.items()}


def main() -> None:
    expected = sys.argv[1:]
    report = {}
    for job in jobs():
        for capability in job.capabilities:
            if not expected or job.name in expected:
                report[f"{job.name} @ {capability}"] = describe(compile_job(job, capability))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
