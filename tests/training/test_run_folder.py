"""Nothing in the folder of a run changes before the run that is to work in it is accepted."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from longvideo.cli.main import main
from longvideo.distributed import Mesh, build_mesh
from longvideo.errors import ConfigError, RefusedByMain
from longvideo.files import BusyError
from longvideo.training.run_folder import claimed
from tests.train.small import Toy
from tests.training.processes import run_in_processes


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def vae(out: Path, *more: str) -> list[str]:
    return ["train", "vae", "tiny/vae", *Toy.vae, *more, "--out", str(out), "--device", "cpu"]


def test_a_refused_run_leaves_the_folder_of_another_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(vae(out)) == 0
    before = contents(out)
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


def test_a_run_folder_is_for_its_owner_alone(tmp_path: Path) -> None:
    assert main(vae(tmp_path / "runs" / "vae")) == 0
    assert stat.S_IMODE((tmp_path / "runs" / "vae").stat().st_mode) == 0o700


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
