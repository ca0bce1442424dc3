"""The command `longvideo`: its sub-commands, and how it ends when something goes wrong."""

import errno
import importlib
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup
from typer.main import get_command

from longvideo import __version__
from longvideo.cli.logs import show_messages
from longvideo.cli.printing import STDERR, printable, without_reader
from longvideo.cli.stopping import exit_code, stop_word
from longvideo.errors import UserError

COMMANDS = {
    "generate": "longvideo.cli.generate:generate",
    "serve": "longvideo.cli.serve:serve",
    "train": "longvideo.cli.train:app",
    "distill": "longvideo.cli.distill:distill",
    "merge": "longvideo.cli.merge:merge",
    "data": "longvideo.cli.data:app",
    "eval": "longvideo.cli.evaluate:app",
    "info": "longvideo.cli.info:info",
    "convert": "longvideo.cli.convert:convert",
    "quantize": "longvideo.cli.quantize:quantize",
    "doctor": "longvideo.cli.doctor:doctor",
    "bench": "longvideo.cli.bench:app",
}
EXIT_USER_ERROR = 2
# errors of a full or read-only disk carry no file name when they come from a write
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})


class CommandGroup(TyperGroup):
    """Imports the module of a sub-command when it is asked for, so that each starts without the others."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        if cmd_name not in self.commands:
            self.commands[cmd_name] = _load_command(cmd_name)
        return self.commands[cmd_name]


app = typer.Typer(cls=CommandGroup, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@app.callback(invoke_without_command=True)
def longvideo(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", hidden=True, help="Show the traceback of an error.")] = False,
) -> None:
    """Make long videos chunk by chunk: generate them, train the models that do, and measure both."""
    if version:
        typer.echo(f"longvideo {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
    if version or context.invoked_subcommand is None:
        raise typer.Exit()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for what the user can mend, 128 + N after signal N."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = arguments[:1] == ["--debug"]
    show_messages()
    try:
        code = app(arguments, prog_name="longvideo", standalone_mode=False)
    except (UserError, OSError, typer.TyperException) as error:
        if debug or not _is_users(error):
            raise
        return _fail(error)
    except KeyboardInterrupt:
        code = exit_code(signal.SIGINT)
    code = code if isinstance(code, int) else 0
    if (word := stop_word(code)) is not None:
        with without_reader(STDERR):
            print(word, file=sys.stderr, flush=True)
    return code


def _load_command(name: str) -> Any:
    module, _, attribute = COMMANDS[name].partition(":")
    command = getattr(importlib.import_module(module), attribute)
    host = typer.Typer(cls=TyperGroup, add_completion=False, rich_markup_mode="markdown")
    host.callback()(lambda: None)
    if isinstance(command, typer.Typer):
        host.add_typer(command, name=name)
    else:
        host.command(name)(command)
    return cast("TyperGroup", get_command(host)).commands[name]


def _is_users(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.filename is not None or error.errno in DISK_ERRORS
    return True


def _fail(error: Exception) -> int:
    # the message is empty where the help was printed instead
    if message := " ".join(_message(error).split()):
        print(f"error: {printable(message)}", file=sys.stderr)
    return EXIT_USER_ERROR


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}" if error.filename is not None else error.strerror.lower()
    if isinstance(error, typer.TyperException):
        message, context = error.format_message(), getattr(error, "ctx", None)
        return f"{message.rstrip('.')}; see {context.command_path} --help" if message and context else message
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
