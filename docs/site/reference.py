"""Write the reference pages of the site from the code: commands, configuration keys, and the Python API."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperArgument

from longvideo.cli.config import SCHEMAS
from longvideo.cli.main import command_line
from longvideo.config.keys import keys_of

if TYPE_CHECKING:
    from collections.abc import Iterator

API = {
    "Generation": (
        "longvideo.infer.pipeline.StreamingPipeline",
        "longvideo.infer.session.Session",
        "longvideo.infer.script.Script",
        "longvideo.infer.script.ShotRequest",
        "longvideo.infer.writer.VideoWriter",
        "longvideo.errors.UserError",
    ),
    "Data": (
        "longvideo.data.manifest.read_manifest",
        "longvideo.data.manifest.write_manifest",
        "longvideo.data.manifest.VideoEntry",
        "longvideo.data.manifest.ShotEntry",
        "longvideo.data.encoded.EncodedDataset",
    ),
    "Configuration": ("longvideo.config.loading.load_config", "longvideo.config.loading.to_yaml"),
    "Models": ("longvideo.model.transformer.CausalTransformer", "longvideo.model.spec.ChunkSpec"),
    "Low precision": (
        "longvideo.quantization.convert.train_in_nvfp4",
        "longvideo.quantization.training.TrainingRecipe",
        "longvideo.quantization.lora.add_lora",
    ),
}
"""Names that the page of the Python API documents, by section."""


def commands_page() -> str:
    """Return a page in Markdown with the help of every command."""
    root = command_line()
    parts = ["# Commands\n\nThis page is generated from the help texts of the commands (`longvideo COMMAND --help`).\n"]
    for path, command in _commands(root, "longvideo"):
        context = typer.Context(command, info_name=path)
        usage = command.get_usage(context).removeprefix("Usage: ")
        parts.append(f"## {path}\n\n{command.help or ''}\n\n```text\n{' '.join(usage.split())}\n```\n")
        records = [record for parameter in command.params if (record := _record(parameter, context))]
        if records:
            rows = [f"| {_code(name)} | {_cell(text)} |" for name, text in records]
            parts.append("\n".join(["| argument or option | meaning |", "|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def keys_page() -> str:
    """Return a page in Markdown with every configuration key, its type, default and meaning."""
    parts = [
        "# Configuration keys\n\nThis page is generated from the dataclasses that hold the defaults,"
        " as `longvideo config keys` prints them. [Configuration](../configuration.md) describes how files"
        " and `key=value` words combine.\n"
    ]
    for command, schema in SCHEMAS.items():
        rows = [
            f"| `{key.name}` | {_code(key.type)} | {_code(key.value)} | {_cell(key.text)} |"
            for key in keys_of(schema())
        ]
        parts.append(f"## longvideo {command}\n")
        parts.append("\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def api_page() -> str:
    """Return a page in Markdown from which mkdocstrings makes the Python API."""
    parts = ["# Python API\n\nThe names under *Generation* are exported by `longvideo` itself.\n"]
    for section, names in API.items():
        parts.append(f"## {section}\n")
        parts += [f"::: {name}\n" for name in names]
    return "\n".join(parts)


def _commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield every command that does something itself, with the words that call it."""
    if not hasattr(command, "get_command"):
        yield path, command
        return
    context = typer.Context(command, info_name=path)
    for name in command.list_commands(context):
        yield from _commands(command.get_command(context, name), f"{path} {name}")


def _record(parameter: Any, context: typer.Context) -> tuple[str, str] | None:
    """Return how a parameter is written and what it means; None for hidden ones and for --help."""
    record = parameter.get_help_record(context)
    if record is None or "--help" in record[0]:
        return None
    name, text = record
    return (re.sub(r"\[*(\w+)\]*.*", r"\1", name), text) if isinstance(parameter, TyperArgument) else (name, text)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _cell(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return re.sub(r"(?<![`\w])(\[)", r"\\\1", text)
