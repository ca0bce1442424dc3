"""Ranks that share every chunk give the latents of one process, each with its part of the cache."""

from __future__ import annotations

import hashlib
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longvideo.errors import UserError
from longvideo.kernels.backends import AttentionPrecision, TransformerPrecision
from longvideo.model.cache import CACHES, CachePrecision
from longvideo.model.spec import ChunkSpec
from longvideo.model.transformer import CausalTransformer
from longvideo.quantization.convert import with_precision
from longvideo.quantization.number_formats import PACKED_CACHES
from longvideo.streaming.parallel import check_ranks
from longvideo.streaming.transformer import StreamingTransformer
from tests.golden import relative_error
from tests.streaming.test_transformer import CONFIG as SMALLER
from tests.streaming.test_transformer import roll_out
from tests.training.processes import run_in_processes

CONFIG = replace(SMALLER, num_attention_heads=4)
# the rollout has 5 chunks and a cut, so chunks leave the window, which has a sink and a pin
SPEC = ChunkSpec(2, 2, chunk_frames=4, window_frames=16, sink_frames=4, pin_shots=True, offset_per_shot=4)


@dataclass(frozen=True)
class Case:
    """A case. bound: upper bound of the relative error of the latents."""

    bound: float
    precision: TransformerPrecision = "bf16"
    kv_cache: CachePrecision = "bf16"
    attention: AttentionPrecision = "bf16"
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "plain": Case(1e-5),
    "the last step keeps": Case(1e-5, options={"clean_pass": False}),
    "samples and guidance": Case(1e-5, options={"samples": 2, "guidance": 3.0}),
    # a 4-bit tensor scale is that of all heads in one process, and of N / R heads on a rank
    "nvfp4 cache": Case(1e-2, kv_cache="nvfp4", options={"samples": 2}),
    "mixed cache": Case(1e-2, kv_cache="nvfp4-mixed", options={"samples": 2}),
    # sums in another order change roundings as much as weights that are changed by 1e-7 in one process
    "fp8 attention": Case(5e-3, attention="fp8-emulated", options={"samples": 2}),
    "fp8 attention, nvfp4 cache": Case(1e-2, kv_cache="nvfp4", attention="fp8-emulated", options={"clean_pass": False}),
    "fp8 products and attention": Case(2e-2, precision="fp8-emulated", attention="fp8-emulated"),
}


@cache
def _weights() -> CausalTransformer:
    torch.manual_seed(0)
    model = CausalTransformer(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.12 if parameter.ndim > 1 else 0.5)
    return model.eval().requires_grad_(False)


def streaming(
    case: Case, group: dist.ProcessGroup | None, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> StreamingTransformer:
    batch = case.options.get("samples", 1) * (2 if "guidance" in case.options else 1)
    return StreamingTransformer(
        with_precision(deepcopy(_weights()).to(device, dtype), case.precision),
        SPEC,
        batch=batch,
        kv_cache=case.kv_cache,
        attention=case.attention,
        group=group,
    )


@dataclass(frozen=True)
class RankResult:
    """Result of a rank in a case. error: relative error against one process. digest: hash of the latents."""

    error: float
    digest: str
    bytes_of_ranks: int
    bytes_of_one: int


def shared(names: list[str]) -> dict[str, RankResult]:
    results = {}
    for name in names:
        case = CASES[name]
        one, own = streaming(case, None), streaming(case, dist.group.WORLD)
        expected, got = (roll_out(denoiser, _weights(), **case.options) for denoiser in (one, own))
        results[name] = RankResult(
            relative_error(got, expected),
            hashlib.sha256(got.numpy().tobytes()).hexdigest(),
            own.cache_bytes * dist.get_world_size(),
            one.cache_bytes,
        )
    return results


@pytest.mark.parametrize(("world", "names"), [(2, list(CASES)), (4, ["plain", "nvfp4 cache", "fp8 attention"])])
def test_ranks_make_the_latents_of_one_process_and_divide_its_cache(world: int, names: list[str]) -> None:
    of_ranks = run_in_processes(world, shared, names)
    for name in names:
        first = of_ranks[0][name]
        assert all(results[name] == first for results in of_ranks), name
        assert first.error < CASES[name].bound, (name, first.error)
        # every rank has all tensor scales of an NVFP4 cache: two of 4 bytes for each layer, slot and sample
        scales = 8 * CONFIG.num_layers * SPEC.window_chunks * CASES[name].options.get("samples", 1)
        more = (world - 1) * scales if CASES[name].kv_cache in PACKED_CACHES else 0
        assert first.bytes_of_ranks == first.bytes_of_one + more


def group_of_one_changes_a_bit() -> bool:
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    case = CASES["fp8 attention, nvfp4 cache"]
    group = groups[dist.get_rank()]
    assert isinstance(group, dist.ProcessGroup)
    latents = [roll_out(streaming(case, ranks), _weights(), **case.options) for ranks in (None, group)]
    return not torch.equal(*latents)


def test_a_group_of_one_changes_no_bit() -> None:
    assert run_in_processes(1, group_of_one_changes_a_bit) == [False]


def test_ranks_that_do_not_divide_are_refused_with_those_that_do() -> None:
    with pytest.raises(UserError, match="3 ranks; expected a number that divides 24 .* frames; use one of 1, 2, 4, 8"):
        check_ranks(3, chunk_frames=8, heads=24, head_dim=128)
    with pytest.raises(UserError, match="8 ranks; expected a number that divides 12 attention heads"):
        check_ranks(8, chunk_frames=8, heads=12, head_dim=128)
    with pytest.raises(UserError, match="the head dim is 12; expected a multiple of 8"):
        check_ranks(2, chunk_frames=8, heads=12, head_dim=12)
    check_ranks(8, chunk_frames=8, heads=24, head_dim=128)


def shared_on_gpus(precision: TransformerPrecision, kv_cache: CachePrecision) -> tuple[float, float, bool, str]:
    """Return the error of the recorded ranks against one GPU, the error of one GPU against float32, whether a second
    video is the same, and a hash of its bits."""
    options: dict[str, Any] = {"samples": 2}
    exact = roll_out(streaming(Case(0.0, options=options), None), _weights(), **options)
    case, device = Case(0.0, precision, kv_cache, options=options), f"cuda:{torch.cuda.current_device()}"
    model = deepcopy(_weights()).to(device, torch.bfloat16)
    one, own = (streaming(case, group, device=device, dtype=torch.bfloat16) for group in (None, dist.group.WORLD))
    own.warm_up()
    expected, got = (roll_out(denoiser, model, **options).cpu() for denoiser in (one, own))
    own.reset()
    again = roll_out(own, model, **options).cpu()
    digest = hashlib.sha256(got.numpy().tobytes()).hexdigest()
    return relative_error(got, expected), relative_error(expected, exact), torch.equal(again, got), digest


@pytest.mark.multigpu
@pytest.mark.parametrize("kv_cache", CACHES)
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_recorded_ranks_make_the_latents_of_one_gpu(precision: TransformerPrecision, kv_cache: CachePrecision) -> None:
    of_ranks = run_in_processes(2, shared_on_gpus, precision, kv_cache, backend="nccl")
    assert len({digest for *_, digest in of_ranks}) == 1
    for error, rounding, same, _ in of_ranks:
        # the largest distance of two results that round differently
        assert error < 2**0.5 * rounding, (error, rounding)
        assert same
