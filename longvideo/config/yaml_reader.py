"""Read YAML within bounds: no document takes more memory or time than its size allows, and every error is one line.

Numbers such as 1e-4 are floats and dates are text, as OmegaConf reads them. A key that occurs twice is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from longvideo.errors import UserError
from longvideo.files import check_text, read_text

if TYPE_CHECKING:
    from pathlib import Path

MAX_BYTES = 4 * 2**20
MAX_DEPTH = 100
MAX_NODES = 200_000
"""Largest number of values in a document, with those that aliases repeat."""
MAX_DIGITS = 40
BASE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
INTEGER, FLOAT, TIMESTAMP, MERGE = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp", "merge"))
FLOATS = re.compile(
    r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
        |[-+]?\.[0-9_]+(?:[eE][-+]?[0-9]+)?
        |[-+]?\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Document:
    """The value of a YAML document.

    lines: line of each item of a list, counted from 1. lines_of: the same of each list that is a value of a mapping, by
    its key.
    """

    value: Any
    lines: tuple[int, ...] = ()
    lines_of: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def read_yaml(path: Path, *, what: str) -> Document:
    """Read a YAML file. what: kind of the file, for errors. Raises UserError with the path and the line."""
    return parse_yaml(read_text(path, what=what, max_bytes=MAX_BYTES), where=str(path))


def parse_yaml(text: str, *, where: str) -> Document:
    """Parse a YAML document. Raises UserError, which begins with `where` and names the line."""
    check_text(text, where)
    try:
        _check_events(text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return Document(None)
            _check_expansion(node)
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            lines_of = {key.value: _item_lines(value) for key, value in pairs if isinstance(key, yaml.ScalarNode)}
            return Document(loader.construct_document(node), _item_lines(node), lines_of)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}: not valid YAML{line}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error


def _item_lines(node: yaml.Node) -> tuple[int, ...]:
    """Return the line of each item of a list; none for other nodes."""
    return tuple(item.start_mark.line + 1 for item in node.value) if isinstance(node, yaml.SequenceNode) else ()


class _Loader(BASE):
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            OverflowError,
        ) as error:  # raised for a tag that does not fit its value
            kind = node.tag.rpartition(":")[2]
            raise _problem(f"this is not a value of the type {kind}", node) from error

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> Any:
        names = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
                if (key.tag, key.value) in names:
                    raise _problem(f"found duplicate key {_shortened(key.value)}", key)
                names.add((key.tag, key.value))
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.Node) -> int:
        if len(str(node.value)) > MAX_DIGITS:
            raise _problem(f"a number has {len(node.value):,} digits; at most {MAX_DIGITS} are read", node)
        return super().construct_yaml_int(node)


_Loader.add_constructor(INTEGER, _Loader.construct_integer)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (TIMESTAMP, FLOAT)]
    for first, resolvers in BASE.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(FLOAT, FLOATS, list("-+0123456789."))


def _check_events(text: str) -> None:
    """Raise YAMLError if values are nested too deep, before any recursive function reads them."""
    depth = count = 0
    for event in yaml.parse(text, Loader=BASE):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        count += isinstance(event, yaml.NodeEvent)
        if depth > MAX_DEPTH:
            raise _problem(f"values are nested more than {MAX_DEPTH} deep", event)
        if count > MAX_NODES:
            raise _problem(f"there are more than {MAX_NODES:,} values", event)


def _check_expansion(root: yaml.Node) -> None:
    """Raise YAMLError if aliases repeat too many values, or if a value contains itself."""
    sizes: dict[int, tuple[int, int] | None] = {}

    def measure(node: yaml.Node, within: int) -> tuple[int, int]:
        """Return the number of values and the depth of a node."""
        if within > MAX_DEPTH:
            raise _problem(f"values are nested more than {MAX_DEPTH} deep", node)
        if id(node) in sizes:
            known = sizes[id(node)]
            if known is None:
                raise _problem("a value holds itself", node)
            return known
        sizes[id(node)] = None
        size, depth = 1, 1
        for child in _children(node):
            own_size, own_depth = measure(child, within + 1)
            size, depth = size + own_size, max(depth, own_depth + 1)
        if size > MAX_NODES or depth > MAX_DEPTH:
            raise _problem(
                f"aliases make more than {MAX_NODES:,} values, or nest them more than {MAX_DEPTH} deep", node
            )
        sizes[id(node)] = size, depth
        return size, depth

    measure(root, 0)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _problem(problem: str, place: yaml.Node | yaml.Event) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, place.start_mark)


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
