"""Every kernel compiles for the GPUs that it supports, on a machine without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("compile_ahead.py")


@pytest.fixture(scope="module")
def machine_code() -> dict[str, dict[str, int]]:
    """Return the report of `compile_ahead.py` on each kernel and compute capability."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_every_kernel_compiles_for_hopper_and_blackwell(machine_code: dict[str, dict[str, int]]) -> None:
    compiled = {tuple(name.split(" @ ")) for name in machine_code}
    for kernel in ("quantize adaptive", "exact", "dequantize", "layer norm quantize", "gelu quantize", "rebuild 128"):
        assert {(kernel, "90"), (kernel, "100")} <= compiled
    assert len(compiled) > 40


def test_scaled_product_runs_on_fp4_units(machine_code: dict[str, dict[str, int]]) -> None:
    for capability in (100, 103, 120):
        assert machine_code[f"scaled product @ {capability}"]["block_scaled"]


def test_no_multiplication_is_contracted_with_an_addition(machine_code: dict[str, dict[str, int]]) -> None:
    """A contraction would round once where the definition rounds twice."""
    assert not [name for name, code in machine_code.items() if code["fused_multiply_add"]]


def test_denormal_numbers_are_kept_where_bits_matter(machine_code: dict[str, dict[str, int]]) -> None:
    # rsqrt and floor flush denormal numbers, which does not change their results
    flushed = {name for name, code in machine_code.items() if code["flush_to_zero"]}
    assert all(name.startswith(("layer norm maxima", "quantize stochastic", "across stochastic")) for name in flushed)


def test_rebuilding_and_writing_out_store_vectors(machine_code: dict[str, dict[str, int]]) -> None:
    for name, code in machine_code.items():
        if name.startswith(("rebuild", "exact", "dequantize")):
            assert code["vector_stores"] and not code["scalar_stores"], name
    for capability in (90, 100):
        for name in ("rebuild 32", "rebuild 64", "rebuild 128", "exact", "dequantize"):
            assert not machine_code[f"{name} @ {capability}"]["shared_memory"]
