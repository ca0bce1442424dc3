"""Every command of the command line, as typer built it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from longvideo.cli.main import HELP_NAMES, command_line


def commands() -> Iterator[tuple[list[str], Any]]:
    """Yield the words that run each command, without `longvideo`, and the command; groups are left out."""
    yield from _below([], command_line())


def options(command: Any) -> dict[str, Any]:
    """Return the options of a command by each of their spellings."""
    context = typer.Context(command, help_option_names=HELP_NAMES)
    parameters = [parameter for parameter in command.get_params(context) if parameter.param_type_name == "option"]
    return {name: parameter for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)}


def _below(words: list[str], command: Any) -> Iterator[tuple[list[str], Any]]:
    if not hasattr(command, "list_commands"):
        yield words, command
        return
    context = typer.Context(command, resilient_parsing=True)
    for name in command.list_commands(context):
        yield from _below([*words, name], command.get_command(context, name))
