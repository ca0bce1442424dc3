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


MISTAKES: dict[str, tuple[str, list[str]]] = {
    "a model that does not exist": (
        "there is no folder or file 'runs/none'; for a model on the Hugging Face hub use hf:runs/none",
        [
            "generate a --model runs/none",
            "serve --model runs/none --port 0",
            "info runs/none",
            "convert runs/none new",
            "quantize runs/none new",
            "merge runs/none lora new",
            "convert tiny new --base runs/none",
            "eval shapeworld --model runs/none",
            "eval switches --model runs/none",
            "eval sensitivity runs/none",
            "eval sheet --model runs/none",
            "data encode old.jsonl --model runs/none -o new",
            "bench stream --model runs/none",
            "train ar cpu/ar initialize=runs/none -o new",
            "distill cpu/dmd model=runs/none -o new",
        ],
    ),
    "a target that exists": (
        "choose another name or add --overwrite",
        [
            "generate a -o old.mp4",
            "convert tiny old",
            "quantize tiny old",
            "merge tiny lora old",
            "data shapeworld --clips 1 -o old",
            "data import-longlive old -o old.jsonl",
            "eval shapeworld -o old",
            "eval switches -o old",
            "eval sensitivity -o old",
            "eval sheet -o old --name old",
        ],
    ),
    "a name that is not a device": (
        "'foo' is not a device; use cpu, cuda or cuda:N",
        [
            "generate a --device foo -o new.mp4",
            "generate a --decode-device foo -o new.mp4",
            "serve --device foo --port 0",
            "doctor --device foo",
            "doctor --model tiny --decode-device foo",
            "eval shapeworld --device foo",
            "eval switches --device foo",
            "eval sheet --device foo",
            "eval quantization --device foo",
            "eval sensitivity --device foo",
            "data encode old.jsonl --model tiny -o new --device foo",
            "bench kernels --device foo",
            "bench step --device foo",
            "bench load --device foo",
            "bench encode --device foo",
            "bench stream --device foo",
            "train vae cpu/vae -o new --device foo",
            "train ar cpu/ar -o new --device foo",
            "distill cpu/dmd -o new --device foo",
        ],
    ),
    "a device that does not exist": (
        "device 'cuda:63' does not exist: this machine has",
        [
            "generate a --device cuda:63 -o new.mp4",
            "serve --device cuda:63 --port 0",
            "doctor --device cuda:63",
            "eval switches --device cuda:63",
            "data encode old.jsonl --model tiny -o new --device cuda:63",
            "bench kernels --device cuda:63",
            "train vae cpu/vae -o new --device cuda:63",
            "distill cpu/dmd -o new --device cuda:63",
        ],
    ),
    "an unknown precision": (
        "precision is 'int4'; expected one of bf16, ",
        [
            "generate a --precision int4 -o new.mp4",
            "serve --precision int4 --port 0",
            "doctor --precision int4",
            "eval shapeworld --precision int4",
            "eval sheet --precision int4",
            "bench stream --precision int4",
            "bench parallel --precision int4",
            "convert tiny new --precision int4",
            "merge tiny lora new --precision int4",
        ],
    ),
    "an unknown preset": (
        "preset is 'foo'; expected one of wan2.2-ti2v-5b, ",
        [
            "generate a --preset foo -o new.mp4",
            "serve --preset foo --port 0",
            "info tiny --preset foo",
            "convert tiny new --preset foo",
            "doctor --preset foo",
            "bench kernels --preset foo",
            "bench stream --preset foo",
        ],
    ),
    "a negative seed": (
        "seed is -1; expected a whole number from 0 to 9223372036854775807",
        [
            "generate a --seed -1 -o new.mp4",
            "eval judge --seed -1",
            "eval shapeworld --seed -1",
            "eval switches --seed -1",
            "eval sheet --seed -1",
            "eval quantization --seed -1",
            "eval sensitivity --seed -1",
            "data shapeworld --seed -1 --clips 1 -o new",
        ],
    ),
    "no solver steps": (
        "steps is 0; expected a whole number from 1 to 1000",
        [
            "generate a --steps 0 -o new.mp4",
            "eval shapeworld --steps 0",
            "eval switches --steps 0",
            "eval sensitivity --steps 0",
            "eval sheet --steps 0",
            "bench stream --steps 0",
            "merge tiny lora new --steps 0",
        ],
    ),
    "a video without length": (
        "seconds is 0; expected a number above 0 and at most 86400 (24 h)",
        [
            "generate a --seconds 0 -o new.mp4",
            "eval shapeworld --seconds 0",
            "eval sheet --seconds 0",
            "data shapeworld --seconds 0 --clips 1 -o new",
        ],
    ),
    "negative guidance": (
        "guidance is -1; expected a number from 0 to 50",
        [
            "generate a --guidance -1 -o new.mp4",
            "eval shapeworld --guidance -1",
            "eval sheet --guidance -1",
            "bench stream --guidance -1",
            "doctor --model tiny --guidance -1",
        ],
    ),
}
"""What a user does wrong, the part of the message that must be the same, and commands in which it can be done."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder, with an older target of every command and an empty adapter."""
    for name in ("old", "lora"):
        (tmp_path / name).mkdir()
    for name in ("old.mp4", "old.jsonl", "old/results.json", "old/old.png"):
        (tmp_path / name).write_text("", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("remedy", "line"),
    [pytest.param(text, line, id=f"{name}: {line}") for name, (text, lines) in MISTAKES.items() for line in lines],
)
def test_the_same_mistake_has_the_same_remedy_in_every_command(
    folder: Path, remedy: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.rglob("*"))
    assert main(line.split()) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and remedy in error
    assert sorted(folder.rglob("*")) == before, "a refused command left files"
