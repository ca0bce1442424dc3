"""Compare the configuration of a run with the one that it was last started with."""

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
    """Return one line with the values that differ from those in the `config.yaml` of a run, or None if none does.

    file: the `config.yaml`. config_text: YAML of the new configuration.
    """
    if not file.exists():
        return None
    try:
        before = read_yaml(file, what="configuration of the run").value
    except UserError as error:
        return f"changes of the configuration are unknown, because {file} cannot be read: {error}"
    changes = list(_changes("", before, parse_yaml(config_text, where="the configuration").value))
    if not changes:
        return None
    listed = ", ".join(f"{key} {_shown(old)} -> {_shown(new)}" for key, old, new in changes)
    return f"the configuration changed since the run was last started: {listed}"


def _changes(key: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield every key whose values differ, with both values, down to items of mappings and of lists of equal length."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys((*old, *new)):
            yield from _changes(f"{key}.{name}" if key else str(name), old.get(name, ABSENT), new.get(name, ABSENT))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _changes(f"{key}[{index}]", one, other)
    elif old != new:
        yield key or "the whole file", old, new


def _shown(value: Any) -> str:
    return value if value == ABSENT else yaml.safe_dump(value, default_flow_style=True, width=10**9).split("\n")[0]
