"""metrics.jsonl holds one record of every step, whatever was in it before."""

from __future__ import annotations

import json
import resource
import subprocess
from pathlib import Path

import pytest

from longvideo.files import WriteError
from longvideo.training.run_log import RunLog, commit_facts

BAD_LINES = (
    b'{"step": 2, "loss": \xff\xfe}',
    b'{"step": NaN, "loss": 1.0}',
    b'{"step": "three", "loss": 1.0}',
    b'{"step": true}',
    b'{"step": -3}',
    b'{"loss": 1.0}',
    b"[3]",
    b'{"step": 3, "lo',
    b"",
)


def test_lines_that_are_not_records_of_a_step_are_dropped_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [f'{{"step": {step}, "loss": 0.5}}'.encode() for step in range(1, 7)]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join((*good[:3], *BAD_LINES, b'{"step": 3, "loss": NaN}', *good[3:])) + b"\n")
    log = RunLog(tmp_path, start_step=4)
    log.record({"step": 5, "loss": 0.25})
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 3, 4, 5]
    assert records[-1]["loss"] == 0.25
    assert f"metrics.jsonl: dropped {len(BAD_LINES)} lines" in capsys.readouterr().out


def test_a_file_of_good_lines_is_not_spoken_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    RunLog(tmp_path, start_step=1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert not capsys.readouterr().out


def test_a_record_that_the_disk_refuses_is_one_line_and_leaves_no_half_record(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.record({"step": 1, "loss": 0.5})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(WriteError, match="metrics.jsonl: file too large; the older one is unchanged"):
            log.record({"step": 2, "loss": 0.25})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_the_recorded_commit_is_that_of_the_repository_that_tracks_the_package(tmp_path: Path) -> None:
    tracked, installed = tmp_path / "own.py", tmp_path / "site" / "own.py"
    installed.parent.mkdir()
    for file in (tracked, installed):
        file.write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "own.py"], ["commit", "-q", "-m", "Add a file"]):
        subprocess.run([*git, *command], check=True)
    facts = commit_facts(tracked)
    assert len(facts["commit"]) == 40 and facts["changed"] == "?? site/"
    assert commit_facts(installed) == {"commit": "unknown", "changed": "unknown"}
