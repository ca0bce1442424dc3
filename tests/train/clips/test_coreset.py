"""Adaptive coreset selection: the score of its paper, the best clips, one choice on all ranks and on resume."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longvideo.config.loading import load_config
from longvideo.distributed import Mesh, build_mesh
from longvideo.errors import ConfigError
from longvideo.flow.schedule import FlowSchedule
from longvideo.model.config import TransformerConfig
from longvideo.model.transformer import CausalTransformer
from longvideo.quantization.training.phase import TrainingPhase
from longvideo.train.batch import ViewStage
from longvideo.train.clips.config import ClipTraining
from longvideo.train.clips.coreset import SELECTION, Coreset, CoresetConfig, best, scores, velocity_norms
from longvideo.train.clips.views import ClipViewConfig, ClipViewSource, RandomClips
from longvideo.train.products import ProductsConfig, prepare
from longvideo.train.teacher_forcing import TeacherForcing, TeacherForcingConfig
from longvideo.training.checkpoint import CheckpointFolder
from longvideo.training.engine import LocalEngine
from longvideo.training.optimizer import OptimizerConfig
from tests.train.test_sequence_parallel import CPU, SPEC, TEXT_DIM, TEXT_LEN
from tests.training.processes import run_in_processes
from tests.training.toy import Regression

CLIPS, CHUNKS = 5, 2


class Fixed:
    """Norms that a test sets, and the number of times that they were computed."""

    def __init__(self, error: list[float], rounding: list[float]) -> None:
        self.norms, self.count = (torch.tensor(error), torch.tensor(rounding)), 0

    def __call__(self) -> tuple[Tensor, Tensor]:
        self.count += 1
        return self.norms


def test_the_score_is_that_of_the_paper() -> None:
    error, rounding = torch.tensor([3.0, 1.0]), torch.tensor([0.5, 2.0])
    for epoch, epochs in ((0, 8), (2, 8), (5, 8), (8, 8), (9, 8)):
        b = math.cos(math.pi * min(epoch, epochs) / (2 * epochs))
        expected = [b * 3.0 + (1 - b) * 0.5, b * 1.0 + (1 - b) * 2.0]
        assert scores(error, rounding, epoch / epochs).tolist() == pytest.approx(expected, rel=1e-6)


def test_the_best_are_those_with_the_highest_scores_and_the_first_of_equal_ones() -> None:
    assert best(torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0]), 3) == [1, 2, 3]


def coreset(norms: Fixed, *, share: float = 0.5, renew_every: int = 2, views: int = 24) -> Coreset:
    config = CoresetConfig(share=share, renew_every=renew_every)
    return Coreset(config, num_clips=6, num_views=views, seed=1, norms=norms)


def test_epochs_show_every_selected_clip_once_and_later_epochs_weigh_the_rounding() -> None:
    norms = Fixed([6, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6])
    selection = coreset(norms)
    seen = []
    for place in range(24):
        selection.prepare(place, place)
        seen.append(selection.clip(place))
    assert norms.count == 24 // (2 * 3)
    epochs = [Counter(seen[first : first + 3]) for first in range(0, 24, 3)]
    assert all(set(epoch.values()) == {1} for epoch in epochs)
    assert [sorted(epoch) for epoch in epochs[:2]] == [[0, 1, 2]] * 2
    # with b = cos(3 pi / 8) = 0.38 in the last period
    assert [sorted(epoch) for epoch in epochs[6:]] == [[3, 4, 5]] * 2
    assert len({tuple(seen[first : first + 3]) for first in range(0, 6, 3)}) == 2


def test_a_step_across_two_selections_has_both() -> None:
    norms = Fixed([6, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6])
    selection = coreset(norms)
    selection.prepare(0, 3)
    assert not selection.covers(6) and selection.covers(5)
    selection.prepare(4, 7)
    assert [selection.clip(place) for place in (4, 5, 6, 7)] and norms.count == 2


def test_a_stored_selection_is_used_again_and_one_of_another_size_is_not(tmp_path: Path) -> None:
    first = coreset(Fixed([6, 5, 4, 3, 2, 1], [0] * 6))
    first.prepare(0, 1)
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(1, LocalEngine(Regression(), OptimizerConfig(), precision="fp32", device=CPU), first.state())
    checkpoint = folder.newest()
    assert checkpoint is not None
    norms = Fixed([0] * 6, [0] * 6)
    second = coreset(norms)
    assert second.load(checkpoint.recipes()[0].read(SELECTION)) is None
    second.prepare(2, 3)
    assert norms.count == 0
    assert [second.clip(place) for place in range(6)] == [first.clip(place) for place in range(6)]
    other = coreset(norms, share=1 / 3)
    line = "the checkpoint's coreset has 3 clips, this one 2: it is selected again"
    assert other.load(first.state()[SELECTION]) == line
    other.prepare(0, 0)
    assert norms.count == 1


class WholeClips(RandomClips):
    """Clips whose frames do not depend on which of them are read."""

    def latents(self, index: int, first: int, last: int) -> Tensor:
        return super().latents(index, 0, self.num_chunks * self.chunk_frames)[:, first:last]


def objective_and_source(mesh: Mesh) -> tuple[TeacherForcing, ClipViewSource]:
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
    products = ProductsConfig(format="nvfp4")
    phases = products.phases(OptimizerConfig(), 10)
    rounding = prepare(products, transformer, phases, spec=SPEC, seed=0, mesh=mesh, warmup_steps=0)
    schedule = FlowSchedule(5.0)
    objective = TeacherForcing(
        transformer,
        None,
        TeacherForcingConfig(),
        spec=SPEC,
        schedule=schedule,
        device=CPU,
        mesh=mesh,
        rounding=rounding,
    )
    clips = WholeClips(
        chunks=CHUNKS,
        chunk_frames=SPEC.chunk_frames,
        latents=(4, SPEC.grid_height * 2, SPEC.grid_width * 2),
        text=(TEXT_LEN, TEXT_DIM),
    )
    clips.clips = clips.clips * CLIPS
    source = ClipViewSource(
        clips,
        [ViewStage(batch=mesh.replicas, chunks=CHUNKS)],
        ClipViewConfig(prompt_dropout=0.0),
        schedule,
        seed=3,
        tokens_per_chunk=SPEC.tokens_per_chunk,
        cuts_matter=False,
        cut_prefix="",
        device=CPU,
    )
    return objective, source


def norms_of(mesh: Mesh) -> tuple[Tensor, Tensor]:
    objective, source = objective_and_source(mesh)
    return velocity_norms(objective, source, num_clips=CLIPS, mesh=mesh, precision="fp32", device=CPU)


def test_the_norms_are_those_of_the_velocities_with_and_without_4_bits() -> None:
    error, rounding = norms_of(Mesh())
    objective, source = objective_and_source(Mesh())
    assert objective.rounding is not None
    for step in range(CLIPS):
        (batch,) = source.shares(step, Mesh(), 1)
        velocities = {}
        with torch.no_grad():
            for phase in (TrainingPhase.BOTH, TrainingPhase.NEITHER):
                objective.rounding.layers.set_phase(phase)
                velocities[phase], target = objective.predict(batch)
        rounded, plain = velocities[TrainingPhase.BOTH], velocities[TrainingPhase.NEITHER]
        clip = source.clip_of(step, 0)
        assert torch.equal(target, batch.noise - batch.clean)
        assert float(error[clip]) == pytest.approx(float((rounded - target).norm()), rel=1e-5)
        assert float(rounding[clip]) == pytest.approx(float((rounded - plain).norm()), rel=1e-5)
    assert float(rounding.min()) > 0 and float((error / rounding).min()) > 2


def in_process(sequence: int) -> list[list[float]]:
    return [norms.tolist() for norms in norms_of(build_mesh(sequence))]


@pytest.mark.parametrize("sequence", [1, 2])
def test_all_ranks_get_the_norms_of_all_clips(sequence: int) -> None:
    first, second = run_in_processes(2, in_process, sequence)
    assert first == second
    assert len(first[0]) == CLIPS and min(map(min, first)) > 0
    if sequence == 2:
        # the noise is that of one process, since both have one replica; each rank has its own tensor scales
        assert first[0] == pytest.approx(norms_of(Mesh())[0].tolist(), rel=0.02)


def test_a_coreset_without_4_bits_is_refused() -> None:
    with pytest.raises(ConfigError, match="coreset.share is 0.5, but products.format is bf16"):
        load_config(ClipTraining, [], ["coreset.share=0.5"])
