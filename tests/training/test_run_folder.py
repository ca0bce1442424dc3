"""Nothing in the folder of a run changes before the run that is to work in it is accepted."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from longvideo.cli.main import main
from longvideo.distributed import Mesh, build_mesh
from longvideo.errors import ConfigError, RefusedByMain
from longvideo.files import BusyError
from longvideo.training.run_folder import claimed, private
from tests.train.small import Toy
from tests.training.processes import run_in_processes


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def modes(folder: Path) -> dict[str, int]:
    paths = (folder, *folder.rglob("*"))
    return {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in paths}


def publish(folder: Path) -> None:
    """Make a folder readable by everyone, as older versions wrote it."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def vae(out: Path, *more: str) -> list[str]:
    return ["train", "vae", "tiny/vae", *Toy.vae, *more, "--out", str(out), "--device", "cpu"]


def test_a_refused_run_leaves_the_folder_of_another_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(vae(out)) == 0
    publish(out)
    before, modes_before = contents(out), modes(out)
    assert {"config.yaml", "environment.json", "metrics.jsonl"} <= before.keys()
    capsys.readouterr()

    assert main(vae(out, "seed=5", "--resume", "never")) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert contents(out) == before

    with claimed(out, Mesh(), resume="auto"):
        assert main(vae(out, "seed=5")) == 2
    assert "another run uses" in capsys.readouterr().err
    assert contents(out) == before

    assert main(vae(out, "model.base_dim=16")) == 2
    assert "belongs to another model" in capsys.readouterr().err
    assert contents(out) == before
    assert modes(out) == modes_before


def test_a_run_folder_is_for_its_owner_alone(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        out = tmp_path / "runs" / "vae"
        out.mkdir(parents=True, mode=0o755)
        assert main(vae(out)) == 0
        assert set(modes(out).values()) == {0o700, 0o600}
        assert stat.S_IMODE(out.parent.stat().st_mode) == 0o755

        publish(out)
        assert main(vae(out)) == 0
        top = {name: mode for name, mode in modes(out).items() if "/" not in name}
        assert top == {name: 0o700 if (out / name).is_dir() else 0o600 for name in top}
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(mask)


def test_files_that_are_not_of_the_run_keep_their_permissions(tmp_path: Path) -> None:
    out, outside = tmp_path / "run", tmp_path / "outside"
    for folder in (out / "checkpoints", out / "mine", outside):
        folder.mkdir(parents=True)
    (out / "model").symlink_to(outside)
    for file in ("metrics.jsonl", ".model.0123abcd.part", "train.log"):
        (out / file).write_text("")
    publish(out)
    outside.chmod(0o755)
    with private(out, Mesh()):
        (out / "config.yaml").write_text("")
    assert modes(out) == {
        ".": 0o755,
        "checkpoints": 0o700,
        "mine": 0o755,
        "model": 0o755,
        "metrics.jsonl": 0o600,
        ".model.0123abcd.part": 0o600,
        "train.log": 0o644,
        "config.yaml": 0o600,
    }
    (out / "mine").rmdir()
    (out / "train.log").unlink()
    with private(out, Mesh()):
        pass
    assert modes(out)["."] == 0o700 and modes(out)["model"] == 0o755


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_the_folder_of_another_user_keeps_its_permissions(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    publish(tmp_path)
    for path in (tmp_path / "checkpoints", tmp_path):
        os.chown(path, 12345, -1)
    with private(tmp_path, Mesh()):
        pass
    assert modes(tmp_path) == {".": 0o755, "checkpoints": 0o755}


def test_a_folder_is_held_by_one_run_and_removed_when_nothing_was_written(tmp_path: Path) -> None:
    out = tmp_path / "new" / "run"
    with claimed(out, Mesh(), resume="never"):
        assert out.is_dir()
        with pytest.raises(BusyError, match="another run uses"), claimed(out, Mesh(), resume="auto"):
            pass
        assert out.is_dir()
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"), claimed(tmp_path / "file", Mesh(), resume="auto"):
        pass


def refused(folder: str) -> str:
    mesh = build_mesh(1)
    try:
        with claimed(Path(folder), mesh, resume="never"):
            return "accepted"
    except ConfigError as error:
        return str(error)
    except RefusedByMain:
        return "refused by the main rank"


def test_every_rank_ends_when_the_main_one_refuses(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    first, second = run_in_processes(2, refused, str(tmp_path))
    assert "already holds a run (metrics.jsonl)" in first
    assert second == "refused by the main rank"
