"""Contents of folders, for tests of what a command leaves in them."""

from __future__ import annotations

from pathlib import Path


def file_names(folder: Path) -> list[str]:
    """Return the sorted names of all entries, hidden ones included."""
    return sorted(path.name for path in folder.iterdir())
