"""Every key of a configuration is explained, with its type and its default."""

from __future__ import annotations

from dataclasses import dataclass, field

from longvideo.config.keys import Key, explanations, keys_of


@dataclass(frozen=True)
class Inner:
    """One item.

    size, weight: numbers of the item, which
        continue here.
    """

    size: int = 3
    weight: float = 0.5


@dataclass(frozen=True)
class Outer:
    """All of it. name: what it is called. items: the items.

    Something else: this is not a key.
    """

    name: str | None = None
    inner: Inner = field(default_factory=lambda: Inner(size=4))
    items: list[Inner] = field(default_factory=list)


def test_keys_have_types_defaults_and_texts() -> None:
    text = "numbers of the item, which continue here."
    assert list(keys_of(Outer)) == [
        Key("name", "str | None", "null", "what it is called."),
        Key("inner.size", "int", "4", text),
        Key("inner.weight", "float", "0.5", text),
        Key("items", "list of Inner", "[]", "the items."),
        Key("items[].size", "int", "3", text),
        Key("items[].weight", "float", "0.5", text),
    ]
    values = {key.name: key.value for key in keys_of(Outer, Outer("x", Inner(5)))}
    assert values["name"] == "x" and values["inner.size"] == "5"


def test_a_class_without_a_docstring_has_no_texts() -> None:
    @dataclass
    class Bare:
        size: int = 1

    assert explanations(Bare) == {}
