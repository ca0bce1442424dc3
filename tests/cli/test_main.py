"""The command line prints an error of the user in one line, and starts quickly."""

import os
import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import Annotated

import pytest
import typer

from longvideo.cli import main as cli
from longvideo.errors import ConfigError

HEAVY = ("torch", "diffusers", "transformers", "av", "matplotlib", "peft")
HELP_SECONDS = 1.5
"""Limit of the processor time, which other processes do not change; without heavy imports it is a third of a second."""

RAISED = {
    "user": ConfigError("steps is 0; expected 1 or more"),
    "lines": ConfigError("first\n    second"),
    "bug": RuntimeError("a bug"),
    "interrupt": KeyboardInterrupt(),
}


def make(what: str, steps: Annotated[int, typer.Option(min=1)] = 1) -> None:  # noqa: ARG001 (only parsed)
    """Make it."""
    if what == "full":
        with Path("/dev/full").open("w") as file:  # every write fails, as on a full disk
            file.write("text")
    elif what == "named":
        Path("missing.txt").read_text()
    elif what == "socket":
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port))
    elif what in RAISED:
        raise RAISED[what]


@pytest.fixture(autouse=True)
def fake_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("fake_commands")
    group = typer.Typer(no_args_is_help=True)
    group.command("one")(make)
    group.command("two")(make)
    module.__dict__.update(make=make, group=group)
    monkeypatch.setitem(sys.modules, "fake_commands", module)
    monkeypatch.setitem(cli.COMMANDS, "make", "fake_commands:make")
    monkeypatch.setitem(cli.COMMANDS, "group", "fake_commands:group")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["make", "user"], "error: steps is 0; expected 1 or more"),
        (["make", "lines"], "error: first second"),
        (["make", "full"], "error: no space left on device"),
        (["make", "named"], "error: missing.txt: no such file or directory"),
        (["group", "two", "user"], "error: steps is 0; expected 1 or more"),
        (["mke"], "error: 'longvideo mke' is not a command; did you mean make?"),
        (["make"], "error: Missing argument 'WHAT'; see longvideo make --help"),
        (["make", "x", "--nothing"], "error: --nothing is not an option; see longvideo make --help"),
        (
            ["make", "x", "--step", "2"],
            "error: --step is not an option; did you mean --steps? See longvideo make --help",
        ),
        (["group", "on"], "error: 'longvideo group on' is not a command; did you mean one?"),
        (["group", "three"], "error: 'longvideo group three' is not a command; expected one of one, two"),
    ],
)
def test_an_error_of_the_user_is_one_line_and_code_2(
    arguments: list[str], line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    out, err = capfd.readouterr()
    assert (out, err.lower()) == ("", line.lower() + "\n")


def test_an_option_out_of_range_is_one_line_and_code_2(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["make", "x", "--steps", "0"]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ") and "--steps" in err and err.count("\n") == 1


def test_ctrl_c_is_one_line_and_code_130(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["make", "interrupt"]) == 130
    assert capfd.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(("name", "error"), [("user", ConfigError), ("full", OSError), ("named", FileNotFoundError)])
def test_debug_lets_the_error_through(name: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        cli.main(["--debug", "make", name])


@pytest.mark.parametrize(("name", "error"), [("bug", RuntimeError), ("socket", ConnectionRefusedError)])
def test_our_own_errors_keep_their_traceback(name: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        cli.main(["make", name])


def test_success_is_code_0() -> None:
    assert cli.main(["make", "x"]) == 0
    assert cli.main(["group", "one", "x", "--steps", "2"]) == 0


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == "longvideo 0.1.0\n"


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("generate", "train", "data", "eval", "info"))


def test_a_group_without_a_command_prints_its_help(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["group"]) == 2
    out, err = capfd.readouterr()
    assert "one" in out + err and "error" not in out + err


@pytest.mark.parametrize("arguments", [[], ["generate"], ["train"], ["data"], ["eval"], ["info"]])
def test_help_starts_quickly_and_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys, time; from longvideo.cli.main import main; code = main(sys.argv[1:]);"
        f"print(); print([name for name in {HEAVY} if name in sys.modules], time.process_time()); sys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "100"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "Usage: longvideo" in result.stdout
    heavy, seconds = result.stdout.splitlines()[-1].rsplit(" ", 1)
    assert heavy == "[]"
    assert float(seconds) < HELP_SECONDS
