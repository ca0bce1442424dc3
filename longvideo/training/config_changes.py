"""What is different between the configuration of a run and the one it was started with before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from longvideo.config.yaml_reader import parse_yaml, read_yaml
from longvideo.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ABSENT = "(absent)"


def changes_line(file: Path, config_text: str) -> str | None:
    """Describe in one line which values differ from those in the config.yaml of a run; None where none does.

    file: that config.yaml, as the run was last started with it. config_text: the YAML of today's configuration.
    """
    if not file.exists():
        return None
    try:
        before = read_yaml(file, what="configuration of the run").value
    except UserError as error:
        return f"what changed in the configuration is unknown, since {file} cannot be read: {error}"
    changes = list(_changes("", before, parse_yaml(config_text, where="the configuration").value))
    if not changes:
        return None
    listed = ", ".join(f"{key} {_shown(old)} -> {_shown(new)}" for key, old, new in changes)
    return f"the configuration changed since the run was last started: {listed}"


def _changes(key: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield every key with its two values, from mappings and lists of equal length item by item."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys((*old, *new)):
            yield from _changes(f"{key}.{name}" if key else str(name), old.get(name, ABSENT), new.get(name, ABSENT))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _changes(f"{key}[{index}]", one, other)
    elif old != new:
        yield key or "everything", old, new


def _shown(value: Any) -> str:
    return value if value == ABSENT else yaml.safe_dump(value, default_flow_style=True, width=10**9).split("\n")[0]
