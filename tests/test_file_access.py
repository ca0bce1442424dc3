"""Files are written through `longvideo.files`, and text is read by its one reader; exceptions have a reason."""

from __future__ import annotations

import ast
from collections.abc import Callable

import pytest

from tests.test_names import ROOT, source_files

WRITERS = {
    "longvideo/files/writing.py": "it implements the writing",
    "longvideo/checkpoint/pickle_file.py": "it fills the temporary file of write_file",
    "longvideo/checkpoint/safetensors_file.py": "it fills the temporary file of write_file",
    "longvideo/training/checkpoint.py": "it fills the temporary folder of write_folder",
    "longvideo/training/run_log.py": "it fills the temporary file of write_file",
    "longvideo/training/tensor_files.py": "it fills the temporary folder of write_folder",
    "train/comparison/runs.py": "a run prints into its log as it goes",
    "infer/frame_files.py": "it fills the temporary file of write_file",
    "infer/writer.py": "a video grows in place, so that it can be played at any time",
    "infer/server/media.py": "a video grows in place, so that it can be played at any time",
}
READERS = {"longvideo/machine/host.py": "files of the kernel in /proc and /sys have no length"}


def test_only_known_modules_open_files_for_writing() -> None:
    assert modules_with(is_write) == WRITERS.keys()


def test_only_known_modules_read_text_themselves() -> None:
    assert modules_with(is_text_read) == READERS.keys()


@pytest.mark.parametrize(
    ("line", "writes", "reads"),
    [
        ("path.write_text('a')", True, False),
        ("path.write_bytes(b'a')", True, False),
        ("path.open('wb')", True, False),
        ("path.open('r+b' if path.exists() else 'x+b')", True, False),
        ("open(path, 'a')", True, False),
        ("path.read_text()", False, True),
        ("open(path)", False, True),
        ("path.open('rb')", False, False),
        ("open(path, 'rb')", False, False),
        ("write_text(path, 'a')", False, False),
        ("read_text(path, what='caption')", False, False),
        ("ModelFolder.open(path)", False, False),
    ],
)
def test_calls_are_recognized(line: str, writes: bool, reads: bool) -> None:
    assert has_call(line, is_write) == writes
    assert has_call(line, is_text_read) == reads


def modules_with(matches: Callable[[ast.Call], bool]) -> set[str]:
    """Return the modules of the library that have a matching call."""
    files = source_files()
    return {str(file.relative_to(ROOT)) for file in files if has_call(file.read_text(encoding="utf-8"), matches)}


def has_call(source: str, matches: Callable[[ast.Call], bool]) -> bool:
    return any(isinstance(node, ast.Call) and matches(node) for node in ast.walk(ast.parse(source)))


def is_write(call: ast.Call) -> bool:
    """Return whether a call opens a file for writing, or writes one."""
    return method(call) in ("write_text", "write_bytes") or any(set("wxa+") & set(mode) for mode in modes(call))


def is_text_read(call: ast.Call) -> bool:
    """Return whether a call reads text without bounds."""
    is_builtin = isinstance(call.func, ast.Name) and call.func.id == "open"
    return method(call) == "read_text" or (is_builtin and not modes(call))


def method(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else ""


def modes(call: ast.Call) -> set[str]:
    """Return the modes in which a call of `open` opens a file: the texts in its argument."""
    if isinstance(call.func, ast.Name) and call.func.id == "open":
        arguments = call.args[1:2]
    elif method(call) == "open":
        arguments = call.args[:1]
    else:
        return set()
    texts = {node.value for argument in arguments for node in ast.walk(argument) if isinstance(node, ast.Constant)}
    return {text for text in texts if isinstance(text, str) and text and not set(text) - set("rwxab+t")}
