"""Hooks of mkdocs: pages that are generated from the code, and links to files outside `docs/`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from diagram import PICTURE, draw
from mkdocs.structure.files import File
from reference import api_page, commands_page, keys_page

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
OUTSIDE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
"""Pages of the repository's root, and the pages of the site that hold them."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and replace the diagram by one drawn now."""
    pages = {
        "reference/commands.md": commands_page(),
        "reference/keys.md": keys_page(),
        "reference/python.md": api_page(),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("](docs/", "]("),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    picture = PICTURE.relative_to(Path(config.docs_dir)).as_posix()
    committed = files.get_file_from_path(picture)
    if committed is not None:
        files.remove(committed)
    files.append(File.generated(config, picture, content=draw()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Point links to the root's pages at their copies in the site, and give indented code its language."""
    for outside, inside in OUTSIDE.items():
        markdown = re.sub(rf"\]\((?:\.\./)?{re.escape(outside)}(?=[#)])", f"]({inside}", markdown)
    return markdown
