"""The pages of `docs/` link to what exists, and the site's generated pages come from the code.

`make docs` builds the site itself, which needs the extra `docs`.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.docs_blocks import read_blocks

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
SOURCE_FILE = re.compile(r"`((?:[a-z_0-9]+/)+[a-z_0-9]+\.(?:py|yaml|sh))`")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def load(name: str) -> ModuleType:
    """Import a module of `docs/site`, which is not a package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "site" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as code hosts and the site make them."""
    text = page.read_text(encoding="utf-8")
    for block in read_blocks(page.name, text):
        text = text.replace(block.text, "")
    names = [re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in HEADING.findall(text)]
    return {re.sub(r" +", "-", re.sub(r"[^\w\- ]", "", name.strip().lower())) for name in names}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_name_files_and_headings_that_exist(page: Path) -> None:
    broken = []
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_source_files_that_are_named_exist(page: Path) -> None:
    names = set(SOURCE_FILE.findall(page.read_text(encoding="utf-8")))
    assert not [name for name in names if not ((ROOT / name).exists() or (ROOT / "longvideo" / name).exists())]


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    assert {page.name for page in PAGES if page.parent.name == "docs"} == set(
        re.findall(r"\b(?<!/)([\w-]+\.md)$", navigation, re.MULTILINE)
    ) - (set(load("reference").ROOT_PAGES.values()) - {"index.md"})


def test_pages_of_the_root_link_to_pages_of_the_site() -> None:
    reference = load("reference")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} | set(reference.ROOT_PAGES.values())
    for name in reference.ROOT_PAGES.keys() - {"README.md"}:
        links = LINK.findall(reference.linked_inside(reference.root_page(name)))
        assert not [link for link in links if "://" not in link and link.partition("#")[0] not in {"", *pages}], name


def test_the_diagram_is_that_of_the_layers_in_pyproject() -> None:
    diagram = load("diagram")
    packages = {name for layer in diagram.read_layers() for name in layer}
    assert not packages - set(diagram.PURPOSES), "describe the package in PURPOSES of docs/site/diagram.py"
    picture = diagram.PICTURE.read_text(encoding="utf-8")
    assert picture == diagram.draw(), "run `python docs/site/diagram.py`"


def test_the_design_names_every_package_in_under_200_lines() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    assert text.count("\n") < 200
    assert not [name for layer in load("diagram").read_layers() for name in layer if f"`{name}" not in text]


def test_the_reference_pages_list_commands_keys_and_names() -> None:
    reference = load("reference")
    commands, keys, names = reference.commands_page(), reference.keys_page(), reference.api_page()
    assert "\n## longvideo data encode\n" in commands and "| `--seconds <float>` |" in commands
    assert "| `optimizer.learning_rate` | `float` |" in keys and "| `stages[].steps` | `int` |" in keys
    assert "\n### Messages of the server\n" in reference.protocol_page()
    for name in re.findall(r"^::: (\S+)$", names, re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
