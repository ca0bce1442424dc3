"""`longvideo serve`: what it prints and returns, and addresses, ports and folders that it refuses."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from longvideo.cli.main import main
from longvideo.infer.server.run import listen
from tests.infer.server.conftest import PROMPT, serve_process, wait_until


def test_it_serves_until_it_is_terminated(model_folder: Path, tmp_path: Path) -> None:
    with serve_process(model_folder, tmp_path) as (process, http):
        assert http.get("/healthz").json() == {"status": "ok"}
        assert http.get("/v1/server").json()["model"] == model_folder.name
        process.terminate()
        out, err = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGTERM and out == ""
    assert err.startswith("loading\nrunning on cpu ") and "Traceback" not in err
    assert (tmp_path / "served" / "jobs.sqlite").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "'--port'"),
        (["--max-sessions", "0"], "'--max-sessions'"),
        (["--max-seconds", "0.5"], "'--max-seconds'"),
        (["--public-host", "https://video.example.org"], "is not a host name"),
        (["--session", "2"], "--session is not an option; did you mean --max-sessions?"),
    ],
)
def test_bad_options_are_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_the_command_refuses_an_open_address_and_a_used_port(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LONGVIDEO_TOKEN", raising=False)
    assert main(["serve", "--host", "0.0.0.0"]) == 2
    assert "--token" in capsys.readouterr().err
    listening = listen("127.0.0.1", 0)
    assert main(["serve", "--port", str(listening.getsockname()[1])]) == 2
    listening.close()
    assert "cannot listen" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["served", "link"])
def test_a_second_process_is_refused_and_changes_nothing(model_folder: Path, tmp_path: Path, folder: str) -> None:
    """The folder is the default one, or a link to it."""
    (tmp_path / "served").mkdir()
    (tmp_path / "link").symlink_to("served")
    with serve_process(model_folder, tmp_path, "--folder", "served") as (_, http):
        running = http.post("/v1/videos", json={"prompt": PROMPT, "seconds": 300}).json()["id"]
        wait_until(lambda: http.get(f"/v1/videos/{running}").json()["frames"] > 0)
        command = [sys.executable, "-m", "longvideo.cli.main", "serve", "--model", str(model_folder), "--port", "0"]
        more = [] if folder == "served" else ["--folder", folder]
        second = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert second.returncode == 2 and second.stdout == ""
        assert f"another process serves {folder}" in second.stderr and "--folder" in second.stderr
        assert http.get(f"/v1/videos/{running}").json()["status"] == "in_progress"
