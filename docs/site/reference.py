"""Write the reference pages of the site from the code: commands, configuration keys, and the Python API."""

from __future__ import annotations

import dataclasses
import re
import typing
from inspect import getdoc
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperArgument

from longvideo.cli.main import command_line
from longvideo.config.fields import BOUNDS
from longvideo.distill.config import Distillation
from longvideo.train.clips.recipe import ClipTraining
from longvideo.train.shapeworld.recipe import ArTraining
from longvideo.train.vae.recipe import VaeTraining

if TYPE_CHECKING:
    from collections.abc import Iterator

CONFIGURATIONS = (
    ("longvideo train vae", VaeTraining),
    ("longvideo train ar", ArTraining),
    ("longvideo train clips", ClipTraining),
    ("longvideo distill", Distillation),
)
"""Commands that read a configuration, and the dataclass of its keys."""

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
    """Return a page in Markdown with every configuration key, its type, default and bounds."""
    parts = [
        "# Configuration keys\n\nThis page is generated from the dataclasses that hold the defaults."
        " [Configuration](../configuration.md) describes how files and `key=value` words combine.\n"
    ]
    for command, cls in CONFIGURATIONS:
        rows = [
            f"| `{key}` | {_code(kind)} | {_code(default)} | {_cell(text)} |" for key, kind, default, text in _keys(cls)
        ]
        parts.append(f"## {command}\n")
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


def _keys(cls: type, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yield key, type, default and meaning of every field, nested dataclasses included."""
    kinds, meanings = typing.get_type_hints(cls), _meanings(cls)
    for field in dataclasses.fields(cls):
        kind = kinds[field.name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from _keys(kind, f"{prefix}{field.name}.")
            continue
        items = [item for item in typing.get_args(kind) if isinstance(item, type) and dataclasses.is_dataclass(item)]
        text = meanings.get(field.name, "")
        if bounds := field.metadata.get(BOUNDS):
            text = f"{text} ({bounds})".strip()
        yield prefix + field.name, _kind_name(kind), _default(field), text
        for item in items:
            yield from _keys(item, f"{prefix}{field.name}[i].")


def _meanings(cls: type) -> dict[str, str]:
    """Return the text after each `name:` or `name, other:` of a docstring, by field."""
    text = " ".join((getdoc(cls) or "").split())
    names = "|".join(sorted((field.name for field in dataclasses.fields(cls)), key=len, reverse=True))
    # the parts between the heads alternate: text, head, text, head, ..., text
    parts = re.split(rf"(?<![\w.`])((?:{names})(?:, (?:{names}))*): ", text)
    return {
        name: meaning.strip()
        for head, meaning in zip(parts[1::2], parts[2::2], strict=True)
        for name in head.split(", ")
    }


def _kind_name(kind: Any) -> str:
    name = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
    return re.sub(r"[\w.]+\.(\w+)", r"\1", name)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return "null" if field.default is None else str(field.default)
    return str(field.default_factory()) if field.default_factory is not dataclasses.MISSING else "required"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _cell(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return re.sub(r"(?<![`\w])(\[)", r"\\\1", text)
