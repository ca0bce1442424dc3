"""A class name has one meaning in the whole library: no two classes share one, private classes included."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("longvideo", "kernels", "train", "distill", "infer")


def test_no_two_classes_share_a_name() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for file in source_files():
        for name, line in class_names(file.read_text(encoding="utf-8")):
            places[name].append(f"{file.relative_to(ROOT)}:{line}")
    assert places["ChunkSpec"] and places["StreamingPipeline"] and places["Trainer"]
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_nested_and_local_classes_are_listed() -> None:
    source = "class A:\n    class B: ...\n\ndef f():\n    class _C: ...\n"
    assert sorted(class_names(source)) == [("A", 1), ("B", 2), ("_C", 5)]


def source_files() -> list[Path]:
    """Return the Python files of the library, each once: `longvideo/` holds links to the other packages."""
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    return sorted(file for file in files if not any(folder.is_symlink() for folder in file.parents))


def class_names(source: str) -> Iterator[tuple[str, int]]:
    """Yield the name and line of every class that a module defines, at any depth."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            yield node.name, node.lineno
