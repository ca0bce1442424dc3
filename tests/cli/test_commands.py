"""What holds for every command: help, shell completion and the spelling of options."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longvideo.cli.main import COMMANDS, main
from tests.cli.commands import commands, options

ALL = [pytest.param(words, command, id=" ".join(words)) for words, command in commands()]
NAMES = {" ".join(words) for words, _ in commands()}
PROGRAMS = Path(sys.executable).parent


def test_the_walk_reaches_every_command() -> None:
    assert {words.split()[0] for words in NAMES} == set(COMMANDS)
    assert {"generate", "train vae", "data encode", "eval sheet", "bench stream"} <= NAMES


@pytest.mark.parametrize("group", ["", "train", "data", "eval", "bench"])
def test_the_short_help_option_prints_the_help_of_a_group(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*group.split(), "-h"]) == 0
    short = capsys.readouterr().out
    assert main([*group.split(), "--help"]) == 0
    assert capsys.readouterr().out == short
    assert "Usage: longvideo" in short and "<bool>" not in short


@pytest.mark.parametrize(("words", "command"), ALL)
def test_help_has_a_short_option_and_flags_without_a_type(
    words: list[str], command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "-h"]) == 0
    text = capsys.readouterr().out
    assert f"Usage: longvideo {' '.join(words)} " in text and "<bool>" not in text
    assert options(command)["-h"] is options(command)["--help"]


NOTHING_TO_NAME = {"config keys", "serve", "merge", "convert", "quantize", "info", "doctor", "data validate"}
"""Commands that write nothing, or whose target is an argument."""


@pytest.mark.parametrize(("words", "command"), ALL)
def test_what_a_command_writes_is_named_by_one_option_of_three_spellings(words: list[str], command: Any) -> None:
    known = options(command)
    output = [known.get(name) for name in ("--output", "--out", "-o")]
    if " ".join(words) in NOTHING_TO_NAME:
        assert output == [None, None, None]
    else:
        assert output[0] is not None and output[1] is output[0] and output[2] is output[0]
        assert output[0].opts == ["--output", "--out", "-o"]


def completions(line: str) -> list[str]:
    """Return what bash offers to complete the last word of a line, through the script that is shown for it."""
    program = """
    source /dev/stdin <<< "$(longvideo --show-completion)"
    COMP_WORDS=($1); [[ $1 == *" " ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _longvideo_completion longvideo
    printf '%s\\n' "${COMPREPLY[@]}"
    """
    environment = {**os.environ, "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", "-c", program, "bash", line]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return result.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("longvideo ge", ["generate"]),
        ("longvideo data imp", ["import-longlive"]),
        ("longvideo generate --decode-s", ["--decode-share"]),
        ("longvideo data shapeworld --split ", ["train", "heldout"]),
        ("longvideo ", list(COMMANDS)),
    ],
)
def test_bash_completes_commands_options_and_their_values(line: str, expected: list[str]) -> None:
    assert completions(line) == expected
