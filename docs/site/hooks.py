"""Hooks of mkdocs: pages that are generated from the code, and links to files outside `docs/`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diagram import PICTURE, draw
from mkdocs.structure.files import File
from reference import ROOT_PAGES, api_page, commands_page, keys_page, linked_inside, protocol_page, root_page

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and the pages of the root, and replace the diagram by one drawn now."""
    picture = PICTURE.relative_to(Path(config.docs_dir)).as_posix()
    contents = {
        "reference/commands.md": commands_page(),
        "reference/keys.md": keys_page(),
        "reference/python.md": api_page(),
        "reference/protocol.md": protocol_page(),
        picture: draw(),
    }
    contents |= {inside: root_page(outside) for outside, inside in ROOT_PAGES.items() if inside != "index.md"}
    for path, content in contents.items():
        if (committed := files.get_file_from_path(path)) is not None:
            files.remove(committed)
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Point links to pages of the root at their copies in the site."""
    return linked_inside(markdown)
