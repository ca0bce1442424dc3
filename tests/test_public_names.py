"""The package exports its public names without the cost of importing what defines them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import longvideo

HEAVY = ("torch", "numpy", "diffusers", "av", "transformers", "typer")
PUBLIC = [name for name in longvideo.__all__ if name != "__version__"]


def test_the_package_imports_nothing_heavy() -> None:
    program = f"import sys, longvideo; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_what_its_module_defines(name: str) -> None:
    value = getattr(longvideo, name)
    assert value.__name__ == name
    assert getattr(sys.modules[value.__module__], name) is value


def test_type_checkers_read_the_same_names_as_the_import() -> None:
    tree = ast.parse(Path(str(longvideo.__file__)).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert {alias.name: node.module for node in imports for alias in node.names} == longvideo._MODULES
    assert sorted(PUBLIC) == sorted(longvideo._MODULES)


def test_the_public_names_are_listed() -> None:
    assert set(longvideo.__all__) <= set(dir(longvideo))


def test_an_unknown_name_is_an_error_that_lists_the_public_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'Pipeline'; expected one of Script, Session"):
        _ = longvideo.Pipeline  # pyright: ignore[reportAttributeAccessIssue]
