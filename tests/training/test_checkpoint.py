"""What a checkpoint folder survives, and the errors for what it does not survive."""

from __future__ import annotations

import json
import random
import resource
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longvideo.checkpoint.run_checkpoint import STATE_FILE, RunState, encode_state, open_tensors, read_state
from longvideo.distributed import build_mesh
from longvideo.errors import CheckpointError, ConfigError
from longvideo.files import WriteError
from longvideo.training import tensor_files
from longvideo.training.checkpoint import CheckpointFolder, layout
from longvideo.training.engine import LocalEngine
from longvideo.training.trainer import Trainer
from longvideo.training.window import Window
from tests.training.processes import run_in_processes
from tests.training.toy import toy_trainer

FILES = tuple(f"{part}_00000_00000.safetensors" for part in ("weights", "ema", "optimizer", "recipe"))
ERRORS = torch.arange(5.0)
LIMIT = 64  # bytes, less than the header of any file


def trainer(folder: Path, *steps: int, **config: Any) -> Trainer:
    run = toy_trainer(folder, *(steps or (40,)), **config)
    run.recipe.state = lambda: {"errors": ERRORS}  # type: ignore[method-assign]
    return run


def trained(folder: Path, *saved_at: int) -> Trainer:
    """Train until the last of these steps, saving at each."""
    run = trainer(folder)
    window = Window(run.device)
    for step in range(saved_at[-1]):
        run.one_step(step, window)
        if step + 1 in saved_at:
            run.save(step + 1)
    return run


def tensors(run: Trainer) -> dict[str, torch.Tensor]:
    engine = run.engine
    return {name: engine.whole(*name.rsplit("/", 1)).detach().clone() for name in layout(engine.shapes())}


@contextmanager
def small_files(limit: int) -> Generator[None]:
    """Let no file of this process grow beyond a number of bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("name", [*FILES, STATE_FILE])
def test_one_flipped_bit_in_any_file_is_noticed_and_the_older_checkpoint_is_named_not_taken(
    tmp_path: Path, name: str
) -> None:
    trained(tmp_path, 4, 8)
    newest = tmp_path / "checkpoints" / "step_0000008"
    assert sorted(path.name for path in newest.iterdir()) == sorted([*FILES, STATE_FILE])
    whole = (newest / name).read_bytes()
    lottery = random.Random(name)
    for place in {0, len(whole) - 1, *(lottery.randrange(len(whole)) for _ in range(20))}:
        bits = bytearray(whole)
        bits[place] ^= 1 << lottery.randrange(8)
        (newest / name).write_bytes(bits)
        again = trainer(tmp_path)
        with pytest.raises(CheckpointError) as caught:
            again.restore("auto")
        message = str(caught.value)
        assert message.startswith(f"{newest} is damaged: ") and str(newest / name) in message, message
        assert message.endswith("step_0000004 is whole; move step_0000008 elsewhere to resume from it")
    (newest / name).write_bytes(whole)
    assert trainer(tmp_path).restore("auto") == 8


def test_files_that_are_cut_or_gone_are_named(tmp_path: Path) -> None:
    trained(tmp_path, 4)
    folder = tmp_path / "checkpoints" / "step_0000004"
    for name in FILES:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-4])
        with pytest.raises(CheckpointError, match=f"{name} has {len(whole) - 4} bytes, but {len(whole)} were written"):
            trainer(tmp_path).restore("auto")
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=f"{name} cannot be read: no such file or directory; there"):
            trainer(tmp_path).restore("auto")
        (folder / name).write_bytes(whole)
    (folder / STATE_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"step_0000004 is damaged: there is no file .*{STATE_FILE}"):
        trainer(tmp_path).restore("auto")


@pytest.mark.parametrize("text", ["[]", "{}", "", "{", '{"step": "x"}', '{"format": 2}', "\udcff"])
def test_a_state_that_is_none_is_damaged(tmp_path: Path, text: str) -> None:
    trained(tmp_path, 4)
    file = tmp_path / "checkpoints" / "step_0000004" / STATE_FILE
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=rf"step_0000004 is damaged: .*{STATE_FILE}"):
        trainer(tmp_path).restore("auto")


def test_what_is_no_checkpoint_is_left_alone_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path, 4, 8)
    folder = tmp_path / "checkpoints"
    for name in ("step_0000005.bad", "step_0000008 (copy)", "step_12", "best"):
        shutil.copytree(folder / "step_0000004", folder / name)
    (folder / "step_0000099").write_text("a note")
    assert trainer(tmp_path).restore("auto") == 8
    names = "best, step_0000005.bad, step_0000008 (copy), step_0000099, step_12"
    assert f"{folder}: ignored {names}, which are not checkpoints\n" in capsys.readouterr().out
    shutil.copytree(folder / "step_0000004", folder / "step_0000009")
    with pytest.raises(CheckpointError, match="step_0000009 is damaged: its state.json is of step 4; step_0000008 is"):
        trainer(tmp_path).restore("auto")


def test_a_damaged_older_checkpoint_is_not_offered(tmp_path: Path) -> None:
    trained(tmp_path, 4, 8)
    for step in (4, 8):
        file = tmp_path / "checkpoints" / f"step_000000{step}" / FILES[0]
        file.write_bytes(file.read_bytes()[::-1])
    with pytest.raises(CheckpointError, match="there is no older whole checkpoint; start again with another --output"):
        trainer(tmp_path).restore("auto")


def test_a_newer_format_is_not_called_damaged(tmp_path: Path) -> None:
    trained(tmp_path, 4)
    file = tmp_path / "checkpoints" / "step_0000004" / STATE_FILE
    file.write_text(encode_state(RunState(step=4, ranks=1, format=3)))
    with pytest.raises(CheckpointError, match="has format 3 of a newer longvideo") as caught:
        trainer(tmp_path).restore("auto")
    assert "damaged" not in str(caught.value)


def test_a_checkpoint_in_many_files_holds_the_same_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "FILE_BYTES", 20)
    first = trained(tmp_path, 4)
    folder = tmp_path / "checkpoints" / "step_0000004"
    assert len(list(folder.glob("optimizer_00000_*.safetensors"))) > 2
    stored = open_tensors(folder, read_state(folder))
    assert stored.infos == layout(first.engine.shapes())
    for name, tensor in tensors(first).items():
        assert torch.equal(stored.read(name), tensor), name


def test_a_full_disk_leaves_the_checkpoint_before_whole_and_nothing_else(tmp_path: Path) -> None:
    run = trained(tmp_path, 4)
    for limit in (0, LIMIT, 300, 700):
        with small_files(limit), pytest.raises(WriteError) as caught:
            run.save(8)
        target = tmp_path / "checkpoints" / "step_0000008"
        assert str(caught.value).startswith(f"cannot write {target}: file too large")
        assert str(caught.value).endswith("the newest whole checkpoint is step_0000004")
        assert [path.name for path in target.parent.iterdir()] == ["step_0000004"]
    assert trainer(tmp_path).restore("auto") == 4
    run.save(8)
    assert trainer(tmp_path).restore("auto") == 8


def saved_with_a_full_disk(folder: str, rank: int) -> str:
    """Save on two ranks, one of which the disk refuses; return the error of this rank."""
    mesh = build_mesh(1)
    engine = toy_trainer(Path(folder), 4).engine
    checkpoints = CheckpointFolder(Path(folder) / "checkpoints", keep=2, mesh=mesh)
    checkpoints.save(1, engine, {"errors": ERRORS})
    with small_files(LIMIT if mesh.rank == rank else resource.RLIM_INFINITY):
        try:
            checkpoints.save(2, engine, {"errors": ERRORS})
        except WriteError as error:
            return str(error)
    return "saved"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_on_one_rank_is_an_error_on_all(tmp_path: Path, rank: int) -> None:
    messages = run_in_processes(2, saved_with_a_full_disk, str(tmp_path), rank)
    message = f"cannot write {tmp_path / 'checkpoints' / 'step_0000002'}: file too large (on rank {rank})"
    assert messages == [f"{message}; the newest whole checkpoint is step_0000001"] * 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_0000001"]


def test_what_killed_processes_left_is_removed_by_the_next_save(tmp_path: Path) -> None:
    run = trained(tmp_path, 4)
    left = tmp_path / "checkpoints" / ".step_0000008.0123abcd.part"
    shutil.copytree(tmp_path / "checkpoints" / "step_0000004", left)
    assert trainer(tmp_path).restore("auto") == 4
    run.save(8)
    assert sorted(path.name for path in left.parent.iterdir()) == ["step_0000004", "step_0000008"]


def test_stages_shorter_than_the_checkpoint_are_refused(tmp_path: Path) -> None:
    trained(tmp_path, 8)
    with pytest.raises(ConfigError, match="is of step 8, but the stages have 5 steps; give them at least 8"):
        trainer(tmp_path, 3, 2).restore("auto")
    assert trainer(tmp_path, 8).restore("auto") == 8


def test_another_model_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    trained(tmp_path, 4)
    other = trainer(tmp_path)
    engine = other.engine
    assert isinstance(engine, LocalEngine)
    engine.named["linear.weight"] = torch.nn.Parameter(torch.zeros(3, 8))
    bias = engine.named["linear.bias"].clone()
    with pytest.raises(CheckpointError, match=r"belongs to another model: 1 tensors differ, among them linear.weight"):
        other.restore("auto")
    assert torch.equal(engine.named["linear.bias"], bias)


def test_weights_survive_a_resume_without_an_average(tmp_path: Path) -> None:
    first = trained(tmp_path, 4)
    resumed = trainer(tmp_path, ema_decay=0.0)
    resumed.restore("auto")
    before, after = tensors(first), tensors(resumed)
    assert not torch.equal(before["linear.weight/weight"], before["linear.weight/average"])
    assert torch.equal(before["linear.weight/weight"], after["linear.weight/weight"])


def as_of_one_process(folder: Path) -> None:
    """Write a checkpoint again in the format of version 0.1, as written in one process."""
    state = read_state(folder)
    stored = open_tensors(folder, state)
    everything = {name: stored.read(name) for name in stored.infos}
    kinds = {"weights": ("weight",), "ema": ("average",), "optimizer": ("exp_avg", "exp_avg_sq", "step")}
    for part, own in kinds.items():
        named = {name: x for name, x in everything.items() if name.rsplit("/", 1)[1] in own}
        if len(own) == 1:
            named = {name.rsplit("/", 1)[0]: x for name, x in named.items()}
        save_file(named, folder / f"{part}.safetensors")
    _finish_format_1(folder, state)


def as_of_two_processes(folder: Path) -> None:
    """Write a checkpoint again in the format of version 0.1, as written in two processes."""
    state = read_state(folder)
    stored = open_tensors(folder, state)
    whole = {name: stored.read(name) for name in stored.infos if not name.endswith("/step")}
    for rank in range(2):
        own = dict(list(whole.items())[rank::2])
        save_file(own, folder / f"rank_{rank:05d}.safetensors")
    (folder / "index.json").write_text(json.dumps({"files": 2, "adam_step": 4.0}))
    _finish_format_1(folder, state)


def _finish_format_1(folder: Path, state: RunState) -> None:
    save_file(load_file(folder / FILES[-1]), folder / "recipe_00000.safetensors")
    for name in state.files:
        (folder / name).unlink()
    (folder / STATE_FILE).write_text(json.dumps({"step": state.step, **state.counts, "ranks": 1}))


@pytest.mark.parametrize("write", [as_of_one_process, as_of_two_processes])
def test_checkpoints_of_format_1_are_resumed(
    tmp_path: Path, write: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    first = trained(tmp_path, 4)
    folder = tmp_path / "checkpoints" / "step_0000004"
    write(folder)
    assert not set(FILES) & {path.name for path in folder.iterdir()}
    resumed = trainer(tmp_path)
    assert resumed.restore("auto") == 4
    assert "is of a version without checksums" in capsys.readouterr().out
    before, after = tensors(first), tensors(resumed)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert resumed.engine.counts() == first.engine.counts()
    newest = resumed.checkpoints.newest()
    assert newest is not None and torch.equal(newest.recipes()[0].read("errors"), ERRORS)
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(CheckpointError, match=f"step_0000004 is damaged: {file}"):
        trainer(tmp_path).restore("auto")


def test_a_distillation_of_format_1_has_the_tensors_of_both_roles(tmp_path: Path) -> None:
    kinds = {"weights": [""], "ema": [""], "optimizer": ["/exp_avg", "/exp_avg_sq", "/step"]}
    expected = {}
    for number, role in enumerate(("student", "critic")):
        (tmp_path / role).mkdir()
        for part, suffixes in kinds.items():
            save_file(
                {f"q/lora_A{suffix}": torch.full((2,), number) for suffix in suffixes},
                tmp_path / role / f"{part}.safetensors",
            )
        for kind in ("weight", "average", "exp_avg", "exp_avg_sq", "step"):
            expected[f"{role}/q/lora_A/{kind}"] = number
    (tmp_path / STATE_FILE).write_text(json.dumps({"step": 3, "ranks": 1, "student_skipped": 0, "critic_skipped": 2}))
    state = read_state(tmp_path)
    assert (state.step, state.ranks, state.counts) == (3, 1, {"student_skipped": 0, "critic_skipped": 2})
    stored = open_tensors(tmp_path, state)
    assert {name: int(stored.read(name)[0]) for name in stored.infos} == expected
