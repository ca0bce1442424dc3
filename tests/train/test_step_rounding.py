"""The seeds of stochastic rounding depend on what is computed, not on the rank that does it."""

from __future__ import annotations

import torch
from torch import Tensor

from longvideo.checkpoint.run_checkpoint import RunState
from longvideo.distributed import Mesh
from longvideo.quantization.training.fp8 import FP8Scaling, FP8TrainingLinear
from longvideo.quantization.training.layers import TrainingLayers
from longvideo.quantization.training.seeds import RoundingSeeds
from longvideo.train.step_rounding import Phases, StepRounding
from tests.train.test_sequence_parallel import SPEC, whole_batch

LAYERS = 3


def rounding(mesh: Mesh, *, seed: int = 0) -> StepRounding:
    own = {str(number): FP8TrainingLinear(16, 16, scaling=FP8Scaling.CURRENT) for number in range(LAYERS)}
    layers = TrainingLayers(own, {}, (), RoundingSeeds(LAYERS, torch.device("cpu")), description="emulated")
    return StepRounding(layers, Phases(100.0), seed=seed, mesh=mesh)


def seeds(mesh: Mesh, *, step: int = 5, seed: int = 0) -> dict[tuple[int, int], Tensor]:
    """Return the seeds of every pass of a rank, by its first view and the place of the rank."""
    own, seeds = rounding(mesh, seed=seed), {}
    own.begin(step)
    for share in whole_batch().shares(mesh, 1, SPEC.chunk_frames):
        own.next_pass(share.first_view)
        assert own.layers.seeds is not None
        seeds[share.first_view, mesh.place] = own.layers.seeds.values.clone()
    return seeds


def test_a_view_has_the_same_seeds_on_any_number_of_ranks() -> None:
    alone = seeds(Mesh())
    assert len(alone) == whole_batch().sigma.shape[0]
    many: dict[tuple[int, int], Tensor] = {}
    for rank in range(2):
        many |= seeds(Mesh(2, rank))
    assert alone.keys() == many.keys()
    assert all(torch.equal(alone[view], many[view]) for view in alone)


def test_seeds_of_views_places_steps_layers_and_runs_differ() -> None:
    drawn = [*seeds(Mesh()).values(), *seeds(Mesh(), step=6).values(), *seeds(Mesh(), seed=1).values()]
    drawn += seeds(Mesh(2, 1, 2)).values()
    values = torch.stack(drawn).flatten()
    assert values.unique().numel() == values.numel() == 4 * whole_batch().sigma.shape[0] * LAYERS * 2


def test_a_resume_with_other_ranks_is_said_to_be_comparable() -> None:
    assert rounding(Mesh()).load(RunState(step=4, ranks=1), []) == []
    for state, mesh in ((RunState(step=4, ranks=2), Mesh()), (RunState(step=4, ranks=2, sequence=2), Mesh(2, 0))):
        (note,) = rounding(mesh).load(state, [])
        assert note.startswith("ranks ") == (state.ranks != mesh.world), note
        assert "parallel.sequence 2 -> 1" in note or state.sequence == 1
        assert note.endswith("losses are comparable, not equal")
