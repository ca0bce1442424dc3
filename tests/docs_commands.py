"""Check that a command exists with its options, configuration and targets, without running it."""

from __future__ import annotations

import re
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
import typer

from longvideo.cli.main import command_line, main
from longvideo.distributed import Mesh, ParallelConfig, check_sequence, divide_batch
from longvideo.model.config import PRESETS
from longvideo.train.clips.config import ClipTraining
from longvideo.train.vae.recipe import VaeTraining
from tests.docs_blocks import python_files
from tests.options import OPTIONS

ROOT = Path(__file__).parents[1]
OTHER_PROGRAMS = frozenset({"git", "cd", "python3", "curl", "pre-commit", "gh", "source", "hf", "ssh"})
"""Programs of others, whose options are not checked."""


def check_command(ranks: int, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail unless a command, which would run on the given number of ranks, could be run as it is written."""
    program, *arguments = Path(words[0]).name, *words[1:]
    if program == "longvideo" and arguments[0] in ("train", "distill"):
        check_training(ranks, arguments, monkeypatch)
    elif program == "longvideo":
        parse(arguments)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert targets(arguments) <= set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
        assert variables(arguments) <= set(re.findall(r"^(\w+) \?=", makefile, re.MULTILINE))
    elif program == "pytest":
        assert python_files(arguments) and all((ROOT / file).is_file() for file in python_files(arguments))
        assert {word for word in arguments if word.startswith("--")} <= {option.name for option in OPTIONS}
    elif program == "pip":
        named = re.findall(r"\[([\w,]+)\]", " ".join(arguments))
        known = metadata("longvideo").get_all("Provides-Extra") or []
        assert {name for names in named for name in names.split(",")} <= set(known)
    else:
        assert program in OTHER_PROGRAMS, f"{program} is not among the known programs"


def targets(arguments: list[str]) -> set[str]:
    """Return the targets among the arguments of make."""
    return {argument for argument in arguments if "=" not in argument}


def variables(arguments: list[str]) -> set[str]:
    """Return the names of the variables that arguments of make set."""
    return {argument.split("=")[0] for argument in arguments if "=" in argument}


def parse(arguments: list[str]) -> None:
    """Read the options of a command as it does itself. Raises typer.TyperException for an unknown one."""
    command: Any = command_line()
    while arguments and hasattr(command, "get_command") and not arguments[0].startswith("-"):
        name, *arguments = arguments
        command = command.get_command(command.make_context(command.name, [], resilient_parsing=True), name)
        assert command is not None, f"{name} is not a command"
    try:
        command.make_context(command.name, list(arguments))
    except typer.Exit as end:  # after --help or --version
        assert end.exit_code == 0


def check_training(ranks: int, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a training command up to the start of the training, and check that its ranks can share the work."""
    configs = []
    monkeypatch.setattr("longvideo.training.run.run", lambda config, *_, **__: configs.append(config))
    assert main(arguments) == 0
    (config,) = configs
    parallel = getattr(config, "parallel", ParallelConfig())
    assert ranks % parallel.sequence == 0 and not (isinstance(config, VaeTraining) and ranks > 1)
    if isinstance(config, ClipTraining):
        heads = PRESETS[config.preset].num_attention_heads
        check_sequence(parallel.sequence, heads=heads, chunk_counts=[stage.chunks for stage in config.stages])
    for stage in config.stages:
        divide_batch(stage.batch, Mesh(ranks, 0, parallel.sequence), parallel.micro_batch)
