"""Read configuration: the defaults of a dataclass, then YAML files, then `key=value`, checked against the dataclass.

A schema is a (nested) frozen dataclass; each default is written there and nowhere else. Unknown keys and wrong types
raise ConfigError, which names the key, the file, and the nearest valid key.
"""

import copy
import dataclasses
import difflib
import logging
import types
import typing
from collections.abc import Hashable, Iterator, Mapping, Sequence
from enum import Enum
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from longvideo.config.fields import check_field
from longvideo.config.yaml_reader import parse_yaml, read_yaml
from longvideo.errors import ConfigError, UserError

T = TypeVar("T")

COMMAND_LINE = "command line"
MISSING = "???"
NEARNESS = 0.6
MOST_SHOWN = 200


@dataclasses.dataclass(frozen=True)
class Renamed:
    """Present name of a key of earlier versions, and the present form of its values, where that differs.

    A schema lists such keys by their earlier names in a class variable `renamed`.
    """

    key: str
    values: Mapping[Any, Any] = dataclasses.field(default_factory=dict)


def load_config(schema: type[T], files: Sequence[str | Path] = (), overrides: Sequence[str] = ()) -> T:
    """Return an instance of `schema` from its defaults, then each file in turn, then each `key=value`; later ones win.

    A file replaces a list as a whole; an override can replace one item, as in `stages[0].steps=100`.

    Raises:
        ConfigError: for a file that cannot be read, an unknown key, a wrong type, and a key without a value.
    """
    config = cast("DictConfig", OmegaConf.structured(schema))
    for file in files:
        config = _merge(config, _read(Path(file)), schema, source=str(file))
    for override in overrides:
        config = _merge(config, _parse_override(override, config), schema, source=COMMAND_LINE)
    sources = [*map(str, files), *([COMMAND_LINE] if overrides else [])]
    return cast("T", _build(config, source=", ".join(sources) or "defaults"))


def sets_key(key: str, files: Sequence[str | Path] = (), overrides: Sequence[str] = ()) -> bool:
    """Return whether a file, or a `key=value`, sets a top-level key or anything below it."""
    names = [override.partition("=")[0].split(".")[0].split("[")[0] for override in overrides]
    return key in names or any(key in _read(Path(file)) for file in files)


def packaged_configs() -> dict[str, Path]:
    """Return the YAML files that the package carries, by names such as `tiny/vae`."""
    root = Path(str(resources.files("longvideo.configs")))
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def find_config(name: str | Path) -> Path:
    """Return the YAML file at the path `name`, or else the packaged one, such as `tiny/vae`.

    Raises:
        ConfigError: if neither exists; the message lists the packaged names.
    """
    if Path(name).is_file():
        return Path(name)
    packaged = packaged_configs()
    key = str(name).removesuffix(".yaml")
    if key in packaged:
        return packaged[key]
    near = difflib.get_close_matches(key, packaged, n=1, cutoff=NEARNESS)
    hint = f"did you mean {near[0]!r}?" if near else f"packaged: {', '.join(packaged) or 'none'}"
    raise ConfigError(f"no configuration {str(name)!r}: neither a file nor a packaged name; {hint}")


def to_yaml(config: Any) -> str:
    """Return a configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True)


def _read(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        raise ConfigError(f"there is no configuration file {file}; check the path")
    try:
        values = read_yaml(file, what="configuration").value
    except UserError as error:
        raise ConfigError(str(error)) from error
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise ConfigError(f"{file} holds a {type(values).__name__}; expected lines of the form `key: value`")
    if wrong := [key for key in values if not isinstance(key, str)]:
        raise ConfigError(f"{file}: the key {wrong[0]!r} is not text; write it in quotes")
    return cast("Mapping[str, Any]", values)


def _parse_override(override: str, config: DictConfig) -> Mapping[str, Any]:
    """Return `a.b[0].c=value` as nested data, with the whole present list around an index."""
    key, equals, text = override.partition("=")
    steps = key.strip().replace("[", ".").replace("]", "").split(".")
    if not equals or not all(steps):
        raise ConfigError(f"{COMMAND_LINE}: {override!r} is not a setting; write key=value")
    try:
        value = parse_yaml(text, where=COMMAND_LINE).value
    except UserError as error:
        shown = override if len(override) <= 60 else f"{override[:60]}..."
        raise ConfigError(f"{COMMAND_LINE}: value of {shown!r} is not valid YAML") from error
    for depth in reversed(range(len(steps))):
        step = steps[depth]
        value = _set_item(config, steps[:depth], int(step), value) if step.isdecimal() else {step: value}
    return cast("Mapping[str, Any]", value)


def _set_item(config: DictConfig, steps: Sequence[str], index: int, value: object) -> list[Any]:
    node = OmegaConf.select(config, ".".join(steps), throw_on_missing=False)
    items = list(cast("Sequence[Any]", OmegaConf.to_container(node))) if OmegaConf.is_config(node) else []
    if index >= len(items):
        raise ConfigError(f"{COMMAND_LINE}: {'.'.join(steps)} has {len(items)} items, but no index {index}")
    if isinstance(value, Mapping) and isinstance(items[index], Mapping):
        value = OmegaConf.to_container(OmegaConf.merge(items[index], value))
    items[index] = value
    return items


def _merge(config: DictConfig, values: Mapping[str, Any], schema: type, *, source: str) -> DictConfig:
    values = _with_present_names(values, getattr(schema, "renamed", {}), source)
    known = _Checker(schema, source).check(values, schema, "")
    try:
        return cast("DictConfig", OmegaConf.merge(config, known))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {_first_line(error)}") from error


def _with_present_names(values: Mapping[str, Any], renamed: Mapping[str, Renamed], source: str) -> Mapping[str, Any]:
    """Return values with earlier keys under their present names; a message names what to write instead.

    Raises ConfigError where a source sets a key under both names.
    """
    present: dict[str, Any] = copy.deepcopy(dict(values))
    for old, new in renamed.items():
        section_name, _, name = old.rpartition(".")
        section = present.get(section_name)
        if not isinstance(section, dict) or name not in section:
            continue
        value = section.pop(name)
        if not section:
            del present[section_name]
        changed = new.values.get(value, value) if isinstance(value, Hashable) else value
        target: Any = present
        *parents, leaf = new.key.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
        if leaf in target:
            raise ConfigError(f"{source}: {old} is the earlier name of {new.key}, which is set too; remove {old}")
        target[leaf] = changed
        message = "%s: %s=%s is read as %s=%s; write that"
        logging.getLogger(__name__).info(message, source, old, _flow(value), new.key, _flow(changed))
    return present


def _flow(value: Any) -> str:
    """Return a value as YAML in one line."""
    return yaml.safe_dump(to_plain(value), default_flow_style=True, width=10**9).removesuffix("\n...\n").strip()


def _build(config: DictConfig, *, source: str) -> object:
    """Create the dataclass, so that the checks of its own `__post_init__` run once, on the final values."""
    try:
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise ConfigError(f"{source}: no value for {', '.join(missing)}; set it in a file or as {missing[0]}=VALUE")
        _check_numbers(config, "")
        return OmegaConf.to_object(config)
    except UserError:
        raise
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{source}: {_first_line(error)}") from error


def _check_numbers(node: DictConfig, key: str) -> None:
    """Check the numbers of a structured node, and of the nodes in it, before instances of its classes are created.

    The whole key is known here, and not in a class.
    """
    schema = OmegaConf.get_type(node)
    for field in dataclasses.fields(schema) if dataclasses.is_dataclass(schema) else ():
        value, place = node[field.name], _join(key, field.name)
        items = list(enumerate(value)) if isinstance(value, ListConfig) else []
        for child, name in [(value, place), *((item, f"{place}[{index}]") for index, item in items)]:
            if isinstance(child, DictConfig):
                _check_numbers(child, name)
        plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        check_field(plain, field, place)


@dataclasses.dataclass(frozen=True)
class _Checker:
    """Compares data from one source with the types of a schema."""

    schema: type
    source: str

    def check(self, value: Any, annotation: Any, key: str) -> Any:
        """Return `value` ready to be merged, with typed dataclasses inside tuples; raise ConfigError if it is wrong."""
        annotation, optional = _strip_optional(annotation)
        if (value is None and optional) or _is_open(value):
            return value
        if dataclasses.is_dataclass(annotation):
            return self._check_fields(value, cast("type", annotation), key)
        if any(dataclasses.is_dataclass(part) for part in _parts(annotation)):
            return self._check_items(value, annotation, key)
        if not _fits(value, annotation):
            self._check_items(value, annotation, key)
            raise self._wrong_type(value, annotation, key)
        return value

    def _check_fields(self, value: Any, schema: type, key: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise self._wrong_type(value, schema, key)
        annotations = _annotations(schema)
        for name in value:
            if name not in annotations:
                raise ConfigError(f"{self.source}: unknown key {_join(key, name)!r}; {self._hint(schema, key, name)}")
        return {name: self.check(item, annotations[name], _join(key, name)) for name, item in value.items()}

    def _check_items(self, value: Any, annotation: Any, key: str) -> Any:
        """Check the items of a list, tuple or dict one by one; return them typed where they are dataclasses."""
        origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
        if origin is dict and isinstance(value, Mapping):
            return {name: self._check_item(item, parts[1], _join(key, name)) for name, item in value.items()}
        if origin in (list, tuple) and isinstance(value, Sequence) and not isinstance(value, str):
            if origin is list or Ellipsis in parts:
                parts = (parts[0],) * len(value)
            if len(parts) == len(value):
                return [
                    self._check_item(item, part, f"{key}[{index}]")
                    for index, (item, part) in enumerate(zip(value, parts, strict=True))
                ]
        raise self._wrong_type(value, annotation, key)

    def _check_item(self, value: Any, annotation: Any, key: str) -> Any:
        checked = self.check(value, annotation, key)
        inner, _ = _strip_optional(annotation)
        # OmegaConf leaves a tuple of dataclasses untyped, so each item gets its type here
        return OmegaConf.merge(OmegaConf.structured(inner), checked) if dataclasses.is_dataclass(inner) else checked

    def _wrong_type(self, value: Any, annotation: Any, key: str) -> ConfigError:
        shown = repr(value)
        shown = shown if len(shown) <= MOST_SHOWN else f"{shown[:MOST_SHOWN]}..."
        return ConfigError(f"{self.source}: {key or 'the file'} is {shown}; expected {_describe(annotation)}")

    def _hint(self, schema: type, parent: str, name: object) -> str:
        siblings = [field.name for field in dataclasses.fields(schema)]
        if near := difflib.get_close_matches(str(name), siblings, n=1, cutoff=NEARNESS):
            return f"nearest is {_join(parent, near[0])!r}"
        by_last_name = {key.rpartition(".")[2]: key for key in _leaf_keys(self.schema)}
        if near := difflib.get_close_matches(str(name), by_last_name, n=1, cutoff=NEARNESS):
            return f"nearest is {by_last_name[near[0]]!r}"
        return f"valid here: {', '.join(siblings)}"


def _fits(value: Any, annotation: Any) -> bool:
    """Return whether OmegaConf would convert `value` to `annotation`."""
    probe = OmegaConf.structured(dataclasses.make_dataclass("Probe", [("value", annotation)]))
    try:
        OmegaConf.merge(probe, {"value": value})
    except OmegaConfBaseException:
        return False
    return True


def _is_open(value: Any) -> bool:
    """Return whether a value is not set yet, or is taken from another key."""
    return isinstance(value, str) and (value == MISSING or "${" in value)


def _annotations(schema: type) -> dict[str, Any]:
    hints = typing.get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


def _strip_optional(annotation: Any) -> tuple[Any, bool]:
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return annotation, False
    parts = [part for part in typing.get_args(annotation) if part is not type(None)]
    optional = len(parts) < len(typing.get_args(annotation))
    return (typing.Union[tuple(parts)], optional) if parts else (annotation, True)  # noqa: UP007


def _parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in typing.get_args(annotation):
        yield from _parts(part)


def _leaf_keys(schema: type, parent: str = "") -> Iterator[str]:
    for name, annotation in _annotations(schema).items():
        inner, _ = _strip_optional(annotation)
        if dataclasses.is_dataclass(inner):
            yield from _leaf_keys(cast("type", inner), _join(parent, name))
        else:
            yield _join(parent, name)


def _join(parent: str, name: object) -> str:
    return f"{parent}.{name}" if parent else str(name)


def _describe(annotation: Any) -> str:
    if dataclasses.is_dataclass(annotation):
        return f"the keys {', '.join(field.name for field in dataclasses.fields(annotation))}"
    if typing.get_origin(annotation) is typing.Literal:
        return f"one of {', '.join(map(repr, typing.get_args(annotation)))}"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return f"one of {', '.join(repr(member.value) for member in annotation)}"
    if typing.get_origin(annotation) is None and isinstance(annotation, type):
        return annotation.__name__
    return str(annotation).replace("typing.", "")


def to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: to_plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
