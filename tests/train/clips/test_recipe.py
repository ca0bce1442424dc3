"""Training on encoded clips: who reads what, and a run in two processes from the command line to a model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longvideo.checkpoint.folder import ModelFolder
from longvideo.cli.main import main
from longvideo.config.loading import load_config
from longvideo.data.encoded import EncodedDataset
from longvideo.distributed import Mesh, build_mesh
from longvideo.errors import ConfigError, UserError
from longvideo.flow.schedule import FlowSchedule
from longvideo.train.batch import ViewStage
from longvideo.train.clips.config import ClipTraining
from longvideo.train.clips.recipe import ClipRecipe
from longvideo.train.clips.video_clips import VideoClips
from longvideo.train.clips.views import ClipViewConfig, ClipViewSource, RandomClip, RandomClips
from longvideo.training.checkpoint import CheckpointFolder
from tests.checkpoint import small
from tests.data import footage
from tests.folders import file_names
from tests.training.processes import run_in_processes

CPU = torch.device("cpu")
CHUNKS, FRAMES, BATCH = 4, 2, 4
FIELDS = ("clean", "noise", "context_noise", "sigma", "context_sigma", "loss_mask", "features")


class Counted(RandomClips):
    """Several clips, and a record of what was read."""

    def __init__(self, count: int = 6, chunks: int = CHUNKS) -> None:
        super().__init__(chunks=chunks, chunk_frames=FRAMES, latents=(3, 2, 4), text=(5, 6))
        self.clips = self.clips * count
        self.read: list[tuple[int, int, int]] = []

    def latents(self, index: int, first: int, last: int) -> Tensor:
        self.read.append((index, first, last))
        whole = super().latents(index, 0, self.num_chunks * FRAMES)
        return whole[:, first:last]


def source(
    clips: Counted, *, cuts_matter: bool = False, cut_prefix: str = "", stage: ViewStage | None = None, **config: Any
) -> ClipViewSource:
    config = {"image_fraction": 0.4, "prompt_dropout": 0.3, "context_noise_fraction": 0.5} | config
    return ClipViewSource(
        clips,
        [stage or ViewStage(batch=BATCH, chunks=CHUNKS)],
        ClipViewConfig(**config),
        FlowSchedule(5.0),
        seed=3,
        tokens_per_chunk=10,
        cuts_matter=cuts_matter,
        cut_prefix=cut_prefix,
        device=CPU,
    )


@pytest.mark.parametrize(("world", "sequence", "micro_batch"), [(2, 2, None), (4, 2, 1), (4, 4, 2), (2, 1, 1)])
def test_shares_of_all_ranks_are_the_whole_batch(world: int, sequence: int, micro_batch: int | None) -> None:
    (whole,) = source(Counted()).shares(5, Mesh(), None)
    replicas: dict[int, list[list]] = {}
    for rank in range(world):
        mesh = Mesh(world, rank, sequence)
        replicas.setdefault(mesh.replica, []).append(source(Counted()).shares(5, mesh, micro_batch))
    for name in FIELDS:
        axis = 2 if name in FIELDS[:3] else 1
        rows = [
            torch.cat([getattr(shares[number], name) for shares in places], dim=axis)
            for places in replicas.values()
            for number in range(len(places[0]))
        ]
        assert torch.equal(torch.cat(rows), getattr(whole, name)), name
    parts = [share for places in replicas.values() for shares in places for share in shares]
    assert float(parts[0].mean_weight) * len(parts) == pytest.approx(float(whole.loss_mask.sum()))


def test_a_rank_reads_its_own_frames_and_no_others() -> None:
    clips = Counted()
    source(clips).shares(0, Mesh(4, 3, 2), 1)
    own = [(first, last) for _, first, last in clips.read]
    assert len(own) >= 2 and set(own) == {(4, 8)}


def test_an_epoch_shows_every_clip_once() -> None:
    views = source(Counted(count=6))
    seen = [views.clip_of(step, view) for step in range(6) for view in range(BATCH)]
    epochs = [seen[first : first + 6] for first in range(0, 24, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_views_that_begin_late_show_their_first_chunk_as_context_alone() -> None:
    stage = ViewStage(batch=64, chunks=2)
    (batch,) = source(Counted(), stage=stage, start_fraction=0.5, image_fraction=0.5).shares(0, Mesh(), None)
    late = (batch.loss_mask[:, :FRAMES] == 0).all(1)
    assert 10 < int(late.sum()) < 54
    is_given = batch.sigma[:, 0] == 0
    assert is_given.any() and not (is_given & late).any()
    assert (batch.loss_mask[is_given, 0] == 0).all() and (batch.loss_mask[is_given, 1:] == 1).all()


def test_views_of_one_chunk_always_have_a_loss() -> None:
    stage = ViewStage(batch=BATCH, chunks=1)
    (batch,) = source(Counted(), stage=stage, start_fraction=0.0, image_fraction=0.0).shares(0, Mesh(), None)
    assert (batch.loss_mask == 1).all() and float(batch.mean_weight) == BATCH * FRAMES


def test_views_whose_cuts_matter_do_not_share_a_pass() -> None:
    views = source(Counted(), cuts_matter=True)
    with pytest.raises(ConfigError, match="parallel.micro_batch=1"):
        views.check(Mesh(), None)
    shares = views.shares(0, Mesh(), 1)
    assert len(shares) == BATCH and shares[0].cuts == (True, False, False, False)


def test_a_chunk_after_a_cut_reads_the_words_that_announce_it() -> None:
    """The first chunk of a clip opens a shot without a cut; one that begins a view in the middle of a clip is cut."""
    clips = Counted(count=1)
    clips.clips = [RandomClip(("a", "a", "b", "b"), (True, False, True, False))]
    config: dict[str, Any] = {"prompt_dropout": 0.0, "start_fraction": 0.5, "image_fraction": 0.0}
    stage = ViewStage(batch=16, chunks=2)
    (batch,) = source(clips, stage=stage, cut_prefix="Cut. ", **config).shares(0, Mesh(), None)
    texts = {first: torch.stack([clips.text(text) for text in two]) for first, two in VIEWS.items()}
    assert batch.features is not None
    views = [next(first for first, text in texts.items() if torch.equal(text, row)) for row in batch.features]
    assert set(views) == {0, 1, 2}
    (dropped,) = source(clips, stage=stage, cut_prefix="Cut. ", **{**config, "prompt_dropout": 1.0}).shares(
        0, Mesh(), None
    )
    assert dropped.features is not None and (dropped.features == clips.text("")).all()


VIEWS = {0: ("a", "a"), 1: ("a", "Cut. b"), 2: ("Cut. b", "b")}


class Failing(Counted):
    def __init__(self, *bad: int) -> None:
        super().__init__()
        self.bad = bad

    def latents(self, index: int, first: int, last: int) -> Tensor:
        if index in self.bad:
            raise UserError(f"clip {index} is damaged")
        return super().latents(index, first, last)


def test_another_clip_takes_the_place_of_one_that_cannot_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    views, whole = source(Failing(2, 3), max_bad=2), source(Counted())
    for step in range(6):
        (got,), (plain,) = views.shares(step, Mesh(), None), whole.shares(step, Mesh(), None)
        clips = [4 if clip in (2, 3) else clip for clip in (whole.clip_of(step, view) for view in range(BATCH))]
        assert [views.clip_of(step, view) for view in range(BATCH)] == clips
        assert torch.equal(got.sigma, plain.sigma) and torch.equal(got.noise, plain.noise)
    assert views.unreadable == {2, 3} and "skipped: clip 2 is damaged" in capsys.readouterr().err
    late = source(Failing(2, 3), max_bad=2)
    (again,) = late.shares(5, Mesh(), None)  # as after a resumption
    assert torch.equal(again.clean, got.clean)


def test_too_many_clips_that_cannot_be_read_stop_the_run() -> None:
    views = source(Failing(2, 3), max_bad=1)
    with pytest.raises(UserError, match=r"2 clips cannot be read, more than views.max_bad=1: numbers 2, 3"):
        for step in range(6):
            views.shares(step, Mesh(), None)
    with pytest.raises(UserError, match="clip 3 is damaged"):
        for step in range(6):
            source(Failing(3)).shares(step, Mesh(), None)


def clips_of_a_rank(max_bad: int) -> list[list[int]]:
    """Two ranks share the frames of a clip; only the second meets the damage."""
    mesh = build_mesh(2)
    views = source(Failing(2) if mesh.rank == 1 else Counted(), max_bad=max_bad)
    seen = []
    for step in range(4):
        views.shares(step, mesh, None)
        seen.append([views.clip_of(step, view) for view in range(BATCH)])
    return seen


def test_ranks_agree_on_what_cannot_be_read() -> None:
    first, second = run_in_processes(2, clips_of_a_rank, 1)
    assert first == second and not any(2 in clips for clips in first)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder and clips encoded with it."""
    folder = tmp_path_factory.mktemp("clips")
    small.save(folder / "model")
    manifest = footage.footage(folder)
    options = ["--chunks", "2", "--device", "cpu", "--workers", "0", "--out", str(folder / "clips")]
    assert main(["data", "encode", str(manifest), "--model", str(folder / "model"), *options]) == 0
    return folder / "model", folder / "clips"


def arguments(data: tuple[Path, Path], *more: str) -> list[str]:
    model, clips = data
    settings = ["objective.context=window", "recycle_errors=true", "recycling.warmup_steps=1"]
    stages = "stages=[{steps: 4, chunks: 2, batch: 2}]"
    return [f"data={clips}", f"initialize={model}", stages, *settings, "trainer.save_every=2", *more]


def validation_losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["val_loss"] for line in lines if "val_loss" in line]


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_a_run_in_one_process_goes_on_with_the_same_bits(data: tuple[Path, Path], tmp_path: Path) -> None:
    fixed = (
        "trainer.precision=fp32",
        "parallel.micro_batch=1",
        "optimizer.schedule=constant",
        "optimizer.learning_rate=1e-3",
    )
    for name, *steps in (("whole",), ("cut", "stages=[{steps: 2, chunks: 2, batch: 2}]"), ("cut",)):
        command = ["train", "clips", *arguments(data, *fixed, *steps), "--out", str(tmp_path / name), "--device", "cpu"]
        assert main(command) == 0
    assert len(losses(tmp_path / "whole")) == 4
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert file_names(tmp_path / "whole" / "samples") == ["ar_0000004.latents.safetensors", "ar_0000004.png"]
    assert ModelFolder.open(tmp_path / "whole" / "model").parts == ("transformer", "vae", "text_encoder")


def test_a_validation_gets_no_recycled_errors(data: tuple[Path, Path]) -> None:
    always = ("recycling.warmup_steps=0", "recycling.clean_probability=0", "recycling.context_probability=1")
    more = (f"validation.data={data[1]}", "validation.batch=2", "parallel.micro_batch=1", *always)
    recipe = ClipRecipe(load_config(ClipTraining, [], arguments(data, *more)), CPU, Mesh(), dry_run=False)
    with torch.no_grad():
        before = recipe.validate()
    recipe.objective(recipe.source.shares(0, Mesh(), 1)[0])
    assert recipe.bank is not None and sum(recipe.bank.filled) > 0
    with torch.no_grad():
        assert recipe.validate() == before


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(data: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    exact = (
        "trainer.precision=fp32",
        f"validation.data={data[1]}",
        "validation.batch=2",
        "recycle_errors=false",
        "parallel.micro_batch=1",
    )
    alone = ["train", "clips", *arguments(data, *exact), "--out", str(tmp_path / "one"), "--device", "cpu"]
    assert main(alone) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    shared = arguments(data, *exact, "parallel.sequence=2", "parallel.zero_stage=2")
    module = ["-m", "longvideo", "train", "clips", *shared]
    where = ["--out", str(tmp_path / "two"), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *module, *where], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    numbers = [validation_losses(tmp_path / name) for name in ("one", "two")]
    assert len(numbers[0]) == 1 and numbers[1] == pytest.approx(numbers[0], rel=1e-4)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert "step 4/4" in done.stdout and ModelFolder.open(tmp_path / "two" / "model").parts


def test_recycled_errors_of_another_number_of_ranks_are_dealt_out_with_a_word(
    data: tuple[Path, Path], tmp_path: Path
) -> None:
    command = ["train", "clips", *arguments(data, "recycling.entries=4"), "--out", str(tmp_path)]
    assert main([*command, "--device", "cpu"]) == 0
    config = load_config(ClipTraining, [tmp_path / "config.yaml"])
    checkpoint = CheckpointFolder(tmp_path / "checkpoints", keep=1).newest()
    assert checkpoint is not None
    one, *two = (ClipRecipe(config, CPU, mesh, dry_run=False) for mesh in (Mesh(), Mesh(2, 0), Mesh(2, 1)))
    assert one.load(checkpoint, Mesh()) == []
    notes = [recipe.load(checkpoint, Mesh(2, rank)) for rank, recipe in enumerate(two)]
    note = "ranks 1 -> 2: recycled errors are divided again, so losses are comparable, not equal"
    assert notes == [[note], [note]]
    filled = [sum(recipe.bank.filled) for recipe in (one, *two) if recipe.bank is not None]
    assert filled[0] == filled[1] + filled[2] > 0 and min(filled) > 0


def test_features_of_the_latest_captions_alone_are_kept(
    data: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, encoded = data
    monkeypatch.setattr("longvideo.train.clips.video_clips.KEPT_TEXTS", 2)
    manifest = encoded.parent / "manifest.jsonl"
    videos = VideoClips(manifest, ModelFolder.open(model), chunks=2, device=CPU, precision="fp32")
    first, second, _ = (videos.text(caption) for caption in ("a ball", "a red ball", "a blue ball"))
    assert videos.text("a red ball") is second
    again = videos.text("a ball")
    assert again is not first and torch.equal(again, first)


@pytest.mark.slow
def test_videos_give_what_their_encoded_clips_do(data: tuple[Path, Path], tmp_path: Path) -> None:
    model, encoded = data
    manifest = encoded.parent / "manifest.jsonl"
    stored = EncodedDataset.open(encoded)
    videos = VideoClips(manifest, ModelFolder.open(model), chunks=2, device=CPU, precision="fp32")
    assert [clip.captions for clip in videos.clips] == [clip.captions for clip in stored.clips]
    for index in range(len(stored)):
        for first, last in ((0, 8), (8, 16), (11, 13)):
            got, expected = videos.latents(index, first, last), stored.latents(index, first, last)
            torch.testing.assert_close(got, expected, rtol=2**-8, atol=1e-4)
    caption = stored.clips[0].captions[0]
    torch.testing.assert_close(videos.text(caption), stored.text(caption), rtol=2**-7, atol=1e-4)
    exact = ("trainer.precision=fp32", "parallel.micro_batch=1", "recycle_errors=false", "validation.prompts=0")
    for name, source in (("videos", manifest), ("encoded", encoded)):
        where = ("--out", str(tmp_path / name), "--device", "cpu")
        command = ["train", "clips", *arguments((model, source), *exact), *where]
        assert main(command) == 0
    assert losses(tmp_path / "videos") == pytest.approx(losses(tmp_path / "encoded"), rel=0.01)


def test_training_goes_on_without_a_damaged_video(
    data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data[1].parent, tmp_path / "copy", ignore=shutil.ignore_patterns("model", "clips"))
    footage.damage(tmp_path / "copy" / "videos" / "0.mp4")
    command = ["train", "clips", *arguments((data[0], tmp_path / "copy" / "manifest.jsonl")), "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "strict")]) == 2
    assert "0.mp4 is damaged" in capsys.readouterr().err
    assert main([*command, "views.max_bad=3", "--out", str(tmp_path / "run")]) == 0
    assert "skipped:" in capsys.readouterr().err and len(losses(tmp_path / "run")) == 4


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("parallel.sequence=3", "parallel.sequence is 3; expected a divisor of the 1 ranks: 1"),
        ("data=nowhere", "nowhere has no dataset.json"),
        ("stages=[{chunks: 3}]", "a stage has chunks=3; expected at most 2"),
        ("products.parts.inputs=adaptiv", "products.parts.inputs is 'adaptiv'; expected one of"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, expected: str
) -> None:
    assert main(["train", "clips", *arguments(data, setting), "--out", str(tmp_path / "run"), "--device", "cpu"]) == 2
    assert expected in capsys.readouterr().err
