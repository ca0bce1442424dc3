"""Write the pages of the site that are not in `docs/`: references from the code, and pages of the root."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperArgument

from longvideo.cli.config import SCHEMAS
from longvideo.cli.main import command_line
from longvideo.config.keys import keys_of

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]

ROOT_PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "CODE_OF_CONDUCT.md": "code_of_conduct.md",
    "README.md": "index.md",
}
"""Pages of the repository's root, and the pages of the site that hold them or take their place."""

API = {
    "Generation": (
        "longvideo.infer.pipeline.StreamingPipeline",
        "longvideo.infer.session.Session",
        "longvideo.infer.script.Script",
        "longvideo.infer.script.ShotRequest",
        "longvideo.infer.writer.VideoWriter",
        "longvideo.errors.UserError",
    ),
    "diffusers": ("longvideo.integrations.diffusers.CausalWanPipeline",),
    "Data": (
        "longvideo.data.manifest.read_manifest",
        "longvideo.data.manifest.write_manifest",
        "longvideo.data.manifest.VideoEntry",
        "longvideo.data.manifest.ShotEntry",
        "longvideo.data.manifest.TimedShotEntry",
        "longvideo.data.encoded.EncodedDataset",
    ),
    "Configuration": ("longvideo.config.loading.load_config", "longvideo.config.loading.to_yaml"),
    "Models": ("longvideo.model.transformer.CausalTransformer", "longvideo.model.spec.ChunkSpec"),
    "Low precision": (
        "longvideo.quantization.training.layers.train_in_nvfp4",
        "longvideo.quantization.training.recipe.TrainingRecipe",
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


def protocol_page() -> str:
    """Return a page in Markdown with the part of the server's page that programs need."""
    text = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    start, end = text.index("\n## Live streams"), text.index("\n## Measurements")
    part = re.sub(r"\]\((?=[\w-]+\.md)", "](../", text[start:end])
    return f"# Protocol\n\nThis is a part of [the server's page](../server.md), for programs as clients.\n{part}\n"


def linked_inside(markdown: str) -> str:
    """Return a page whose links to pages of the root are links to pages of the site."""
    for outside, inside in ROOT_PAGES.items():
        markdown = re.sub(rf"\]\((?:\.\./)?{re.escape(outside)}(?=[#)])", f"]({inside}", markdown)
    return markdown


def root_page(name: str) -> str:
    """Return a page of the root as it is in the site."""
    return (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")


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
