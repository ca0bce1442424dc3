"""Dividing a step over ranks changes neither its loss nor any gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longvideo.distributed import Mesh, build_mesh, check_sequence, common_passes, divide_batch
from longvideo.errors import ConfigError
from longvideo.flow.schedule import FlowSchedule
from longvideo.model.attention import Blockwise, Masked
from longvideo.model.cache import visible_chunks
from longvideo.model.config import TransformerConfig
from longvideo.model.layout import TokenLayout
from longvideo.model.spec import ChunkSpec
from longvideo.model.transformer import CausalTransformer
from longvideo.train.batch import ViewBatch
from longvideo.train.teacher_forcing import TeacherForcing, TeacherForcingConfig
from tests.training.processes import run_in_processes

CPU = torch.device("cpu")
CHUNKS, VIEWS, TEXT_LEN, TEXT_DIM = 4, 4, 5, 16
SPEC = ChunkSpec(
    grid_height=2, grid_width=2, chunk_frames=2, window_frames=6, sink_frames=2, pin_shots=True, offset_per_shot=3
)
CUTS = (True, False, True, False)


def small_transformer() -> CausalTransformer:
    config = TransformerConfig(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_DIM,
        ffn_dim=32,
        num_layers=2,
        text_len=TEXT_LEN,
    )
    transformer = CausalTransformer(config)
    generator = torch.Generator().manual_seed(0)
    transformer.initialize(generator)
    torch.nn.init.normal_(transformer.head.head.weight, std=0.1, generator=generator)
    return transformer


def whole_batch(*, cuts: tuple[bool, ...] | None = None) -> ViewBatch:
    """Views of which some frames have no loss: a given image, chunks that are context alone, padding."""
    generator = torch.Generator().manual_seed(1)
    frames = CHUNKS * SPEC.chunk_frames

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    mask = torch.ones(VIEWS, frames)
    mask[0, 0] = 0
    mask[1, : SPEC.chunk_frames] = 0
    mask[3, 5:] = 0
    shape = (VIEWS, 4, frames, 2 * SPEC.grid_height, 2 * SPEC.grid_width)
    return ViewBatch(
        normal(*shape),
        normal(*shape),
        normal(*shape),
        torch.rand(VIEWS, CHUNKS, generator=generator).repeat_interleave(SPEC.chunk_frames, 1),
        0.2 * torch.rand(VIEWS, frames, generator=generator),
        mask,
        ids=None,
        mask=None,
        features=normal(VIEWS, CHUNKS, TEXT_LEN, TEXT_DIM),
        mean_weight=mask.sum(),
        cuts=cuts,
    )


def gradients(
    mesh: Mesh,
    config: TeacherForcingConfig,
    micro_batch: int | None,
    batch: ViewBatch,
    *,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and the gradients of a step, averaged over all ranks and passes."""
    transformer = small_transformer().to(device, dtype)
    objective = TeacherForcing(
        transformer, None, config, spec=SPEC, schedule=FlowSchedule(5.0), device=device, mesh=mesh
    )
    batch = replace(batch, **{name: x.to(device) for name, x in vars(batch).items() if isinstance(x, Tensor)})
    shares = batch.shares(mesh, micro_batch, SPEC.chunk_frames)
    parts = mesh.world * len(shares)
    total = torch.zeros((), device=device)
    for share in shares:
        loss, _ = objective(share)
        loss.backward()
        total += loss.detach()
    results = {}
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, name
        results[name] = mesh.sum(parameter.grad.float()) / parts
    return mesh.sum(total) / parts, results


CASES = {
    "run by run": (TeacherForcingConfig(), None, None),
    "one mask": (TeacherForcingConfig(attention="masked"), None, None),
    "window and cuts": (TeacherForcingConfig(attention="masked", context="window"), None, CUTS),
    "window, run by run, recomputed": (TeacherForcingConfig(context="window", checkpoint=True), None, CUTS),
    "one view a pass": (TeacherForcingConfig(), 1, None),
}


def differences(sequences: list[int]) -> dict[str, float]:
    """Return the largest relative difference of any gradient, and of the loss, from those of a single process."""
    results = {}
    for sequence in sequences:
        mesh = build_mesh(sequence)
        for name, (config, micro_batch, cuts) in CASES.items():
            batch = whole_batch(cuts=cuts)
            expected_loss, expected = gradients(Mesh(), config, None, batch)
            loss, got = gradients(mesh, config, micro_batch, batch)
            worst = max(float((got[key] - expected[key]).norm() / expected[key].norm()) for key in expected)
            key = f"{name}, {mesh.replicas} x {sequence}"
            results[key] = max(worst, float((loss - expected_loss).abs() / expected_loss))
    return results


@pytest.mark.parametrize(("world", "sequences"), [(2, [1, 2]), (4, [2, 4])])
def test_every_gradient_equals_that_of_one_process(world: int, sequences: list[int]) -> None:
    per_rank = run_in_processes(world, differences, sequences)
    for results in per_rank:
        assert len(results) == len(sequences) * len(CASES)
        assert max(results.values()) < 1e-5, results


def differences_on_gpus() -> dict[str, float]:
    """Return, for each way to run, the largest relative difference of a gradient from one process in fp32."""
    device, config = torch.device("cuda", torch.cuda.current_device()), TeacherForcingConfig(compile=False)
    _, expected = gradients(Mesh(), config, None, whole_batch(), device=device)
    results = {}
    for name, mesh in (("one", Mesh()), ("shared", build_mesh(2))):
        for dtype in (torch.float32, torch.bfloat16):
            _, got = gradients(mesh, config, None, whole_batch(), device=device, dtype=dtype)
            worst = max(float((got[key] - expected[key]).norm() / expected[key].norm()) for key in expected)
            results[f"{name} {dtype}"] = worst
    return results


@pytest.mark.multigpu
def test_gradients_of_two_gpus_are_those_of_one_and_bf16_adds_only_its_noise() -> None:
    for results in run_in_processes(2, differences_on_gpus, backend="nccl"):
        assert results["shared torch.float32"] < 1e-5, results
        assert results["shared torch.bfloat16"] < 1.2 * results["one torch.bfloat16"] < 0.05, results


def test_balanced_layout_is_a_permutation_that_gives_every_rank_equal_shares() -> None:
    whole = TokenLayout.teacher_forcing(SPEC, CHUNKS, CUTS)
    balanced = TokenLayout.balanced(SPEC, CHUNKS, ranks=2, cuts=CUTS)
    for rank in range(2):
        own = balanced.part(rank, 2)
        assert own.is_noisy_L.float().mean() == 0.5
        assert set(own.chunk_L.tolist()) == {2 * rank, 2 * rank + 1}
    rows = [torch.cat((x.chunk_L[:, None], x.is_noisy_L[:, None], x.position_BL3[0]), 1) for x in (whole, balanced)]
    assert torch.equal(*(x[torch.tensor(sorted(range(len(x)), key=lambda i, x=x: x[i].tolist()))] for x in rows))


def test_windowed_run_by_run_attention_equals_the_mask() -> None:
    layout = TokenLayout.balanced(SPEC, CHUNKS, ranks=2, cuts=CUTS)
    visible = visible_chunks(SPEC, list(CUTS))
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, layout.chunk_L.numel(), 2, 8, generator=generator) for _ in range(3))
    got, expected = (pattern(layout, visible).rotated(q, k, v) for pattern in (Blockwise, Masked))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_sizes_that_do_not_divide_are_refused_with_those_that_do() -> None:
    message = "a divisor of 24 attention heads and of videos of 12 chunks: 1, 2, 3, 4, 6, 12"
    with pytest.raises(ConfigError, match=f"parallel.sequence is 5; expected {message}"):
        check_sequence(5, heads=24, chunk_counts=[12])
    with pytest.raises(ConfigError, match="such as 6"):
        divide_batch(7, Mesh(world=4, rank=0, sequence=2), 1)
    with pytest.raises(ConfigError, match="4 chunks do not divide into 3 ranks"):
        whole_batch().shares(Mesh(world=3, sequence=3), None, SPEC.chunk_frames)


def test_stages_of_different_numbers_of_passes_are_refused_on_one_rank_too() -> None:
    assert common_passes([2, 2]) == 2 and common_passes([]) == 1
    with pytest.raises(ConfigError, match="stages have 1 and 3 passes of a step; .* or leave out parallel.micro_batch"):
        common_passes([3, 1, 3])


def test_mean_weight_counts_all_frames_with_a_loss() -> None:
    batch = whole_batch()
    shares = [
        share for rank in range(4) for share in batch.shares(Mesh(world=4, rank=rank, sequence=2), 1, SPEC.chunk_frames)
    ]
    assert len(shares) == 8
    assert sum(float(share.loss_mask.sum()) for share in shares) == float(batch.loss_mask.sum())
    assert all(float(share.mean_weight) * 8 == pytest.approx(float(batch.loss_mask.sum())) for share in shares)
    assert torch.equal(torch.cat([s.clean for s in shares[:2]]), batch.clean[:2, :, :4])
    assert replace(batch).cuts is None
