"""Describe the keys of a configuration: type, default, and the sentence of the docstring that explains each."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import yaml

from longvideo.config.loading import to_plain
from longvideo.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@dataclass(frozen=True)
class Key:
    """One key of a configuration.

    name: as it is written on the command line; `stages[].steps` is a key of every item of a list. value: default, or
    value of a preset, as YAML. text: explanation, empty where the docstring has none.
    """

    name: str
    type: str
    value: str
    text: str


def keys_of(schema: type, config: Any = None) -> Iterator[Key]:
    """Yield all keys of a dataclass and of the dataclasses in it, in their order.

    config: an instance whose values are given instead of the defaults.
    """
    yield from _keys_of(schema, _values(schema) if config is None else vars(config), "")


def _keys_of(schema: type, values: dict[str, Any], parent: str) -> Iterator[Key]:
    hints, texts = typing.get_type_hints(schema), explanations(schema)
    for field in dataclasses.fields(schema):
        name, value = f"{parent}{field.name}", values[field.name]
        annotation = hints[field.name]
        (item,) = [part for part in typing.get_args(annotation) if dataclasses.is_dataclass(part)] or [None]
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            yield from _keys_of(annotation, vars(value), f"{name}.")
            continue
        yield Key(name, _type_name(annotation), _as_yaml(value), texts.get(field.name, ""))
        if isinstance(item, type):
            yield from _keys_of(item, _values(item), f"{name}[].")


def explanations(schema: type) -> dict[str, str]:
    """Return the texts of a docstring that follow `name:` or `name, other:`, by the names of fields."""
    text = inspect.getdoc(schema) or ""
    if text.startswith(f"{schema.__name__}("):  # a dataclass without a docstring has its signature there
        return {}
    name = rf"(?:{'|'.join(field.name for field in dataclasses.fields(schema))})"
    entries = list(re.finditer(rf"(?:^|(?<=[.;]\s))({name}(?:,\s{name})*):\s", text, re.MULTILINE))
    starts = [*(entry.start() for entry in entries), len(text)]
    texts = {}
    for entry, end in zip(entries, starts[1:], strict=True):
        paragraph = text[entry.end() : end].split("\n\n")[0]
        for key in entry[1].split(","):
            texts[key.strip()] = " ".join(paragraph.split())
    return texts


def select_keys(keys: Sequence[Key], prefix: str) -> list[Key]:
    """Return the keys at or below a prefix such as `optimizer`. Raises ConfigError if there is no such key."""
    chosen = [key for key in keys if key.name == prefix or key.name.startswith((f"{prefix}.", f"{prefix}["))]
    if not chosen:
        top = dict.fromkeys(re.split(r"[.\[]", key.name)[0] for key in keys)
        raise ConfigError(f"{prefix!r} is not a key; expected one of {', '.join(top)}, or a key below one of them")
    return chosen


def _values(schema: type) -> dict[str, Any]:
    """Return the defaults of a dataclass without making an instance, which may refuse them."""
    return {
        field.name: field.default_factory()
        if field.default_factory is not dataclasses.MISSING
        else None
        if field.default is dataclasses.MISSING
        else field.default
        for field in dataclasses.fields(schema)
    }


def _type_name(annotation: Any) -> str:
    """Return a type as a reader of the command line understands it."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is list:
        return f"list of {_type_name(parts[0])}"
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_type_name, parts))
    if origin is typing.Literal:
        return " | ".join(map(str, parts))
    if annotation is type(None):
        return "None"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " | ".join(str(member.value) for member in annotation)
    return annotation.__name__ if origin is None and isinstance(annotation, type) else str(annotation)


def _as_yaml(value: Any) -> str:
    text = yaml.safe_dump(to_plain(value), default_flow_style=True, sort_keys=False, width=10**9)
    return text.removesuffix("\n...\n").strip()
