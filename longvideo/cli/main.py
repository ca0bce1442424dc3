"""The command `longvideo`: its sub-commands, and how it ends after an error."""

import errno
import importlib
import signal
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup
from typer.main import get_command

from longvideo import __version__
from longvideo.cli.logs import show_messages
from longvideo.cli.printing import STDERR, printable, without_reader
from longvideo.cli.stopping import exit_code, stop_word
from longvideo.errors import EXIT_USER_ERROR, RefusedByMain, UserError
from longvideo.machine.launcher import is_main_process

COMMANDS = {
    "generate": "longvideo.cli.generate:generate",
    "decode": "longvideo.cli.decode:decode",
    "serve": "longvideo.cli.serve:serve",
    "train": "longvideo.cli.train:app",
    "distill": "longvideo.cli.distill:distill",
    "merge": "longvideo.cli.merge:merge",
    "config": "longvideo.cli.config:app",
    "data": "longvideo.cli.data:app",
    "eval": "longvideo.cli.evaluate:app",
    "info": "longvideo.cli.info:info",
    "convert": "longvideo.cli.convert:convert",
    "quantize": "longvideo.cli.quantize:quantize",
    "doctor": "longvideo.cli.doctor:doctor",
    "bench": "longvideo.cli.bench:app",
}
HELP_NAMES = ["--help", "-h"]
# an error of a full or read-only disk has no file name when it comes from a write
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})


class Group(TyperGroup):
    """A group of commands that names the nearest one when an unknown one is given."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if not ctx.resilient_parsing and self.get_command(ctx, args[0]) is None:
            names = self.list_commands(ctx)
            nearest = get_close_matches(args[0], names, n=1)
            remedy = f"did you mean {nearest[0]}?" if nearest else f"expected one of {', '.join(names)}"
            raise UserError(f"'{ctx.command_path} {args[0]}' is not a command; {remedy}")
        return super().resolve_command(ctx, args)


class LazyGroup(Group):
    """Imports the module of a sub-command when it is used, so that no command loads the others."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 (overrides)
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002 (overrides)
        if cmd_name not in COMMANDS:
            return None
        if cmd_name not in self.commands:
            self.commands[cmd_name] = _load_command(cmd_name)
        return self.commands[cmd_name]


app = typer.Typer(
    cls=LazyGroup,
    context_settings={"help_option_names": HELP_NAMES},
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback(invoke_without_command=True)
def longvideo(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[  # noqa: ARG001 (`main` reads it before typer does)
        bool, typer.Option("--debug", hidden=True, help="Show the traceback of an error.")
    ] = False,
) -> None:
    """Generate long videos chunk by chunk, train and distill the models that make them, and measure both."""
    if version:
        typer.echo(f"longvideo {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
    if version or context.invoked_subcommand is None:
        raise typer.Exit()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 after an error of the user, 128 + N after signal N."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = arguments[:1] == ["--debug"]
    try:
        show_messages(is_main=is_main_process())
        code = command_line()(arguments, prog_name="longvideo", standalone_mode=False)
    except RefusedByMain:
        return EXIT_USER_ERROR
    except (UserError, OSError, typer.TyperException) as error:
        if debug or not _is_users(error):
            raise
        return _fail(error)
    except KeyboardInterrupt:
        code = exit_code(signal.SIGINT)
    code = code if isinstance(code, int) else 0
    if (word := stop_word(code)) is not None and is_main_process():
        with without_reader(STDERR):
            print(word, file=sys.stderr, flush=True)
    return code


def command_line() -> TyperGroup:
    """Return the command `longvideo` as typer runs it; it loads its sub-commands when they are used."""
    return cast("TyperGroup", _with_plain_flags(get_command(app)))


def _load_command(name: str) -> Any:
    module, _, attribute = COMMANDS[name].partition(":")
    command = getattr(importlib.import_module(module), attribute)
    host = typer.Typer(cls=TyperGroup, add_completion=False, rich_markup_mode="markdown")
    host.callback()(lambda: None)
    if isinstance(command, typer.Typer):
        host.add_typer(command, name=name, cls=Group)
    else:
        host.command(name)(command)
    return _with_plain_flags(cast("TyperGroup", get_command(host)).commands[name])


def _with_plain_flags(command: Any) -> Any:
    """Write the flags of a command and of its sub-commands without `<bool>` in their help; return the command."""
    help_option = command.get_help_option(typer.Context(command, help_option_names=HELP_NAMES))
    for parameter in [*command.params, help_option]:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    for subcommand in getattr(command, "commands", {}).values():
        _with_plain_flags(subcommand)
    return command


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
        return _usage_message(error)
    return str(error)


def _usage_message(error: typer.TyperException) -> str:
    """Return what is wrong with the words of a command, and which help describes them."""
    message, context = error.format_message().rstrip("."), getattr(error, "ctx", None)
    if not message or context is None:
        return message
    if hasattr(error, "possibilities"):  # an unknown option, with the known ones that resemble it
        names: Sequence[str] = getattr(error, "possibilities", None) or ()
        nearest = f"did you mean {names[0]}? See" if names else "see"
        message = f"{getattr(error, 'option_name', 'a word')} is not an option; {nearest}"
    else:
        message = f"{message}; see"
    return f"{message} {context.command_path} --help"


if __name__ == "__main__":
    sys.exit(main())
