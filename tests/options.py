"""Options of this project's tests, which repeat or enlarge some of them; CONTRIBUTING.md lists them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class SuiteOption:
    """name: as on the command line. kind: converts its text. metavar: the value's name in help and documentation."""

    name: str
    metavar: str
    kind: Callable[[str], Any]
    default: Any
    help: str


OPTIONS = (
    SuiteOption("--soak", "N", int, 2, "Repetitions of each kill, stop and restart in tests/soak/."),
    SuiteOption("--hold-seconds", "S", float, 6.0, "Seconds for which unfinished connections are held."),
    SuiteOption("--api-cases", "N", int, 60, "Generated requests for each operation of the HTTP interface."),
    SuiteOption("--stream-seconds", "S", float, 16.0, "Length of the long stream, in seconds of video (16 or more)."),
    SuiteOption("--stream-clients", "N", int, 8, "Clients that connect to the server one after the other."),
    SuiteOption("--disconnects", "N", int, 20, "Clients that leave at random moments."),
    SuiteOption("--full-size", "FOLDER", Path, None, "Folder with 50 GB of free space, for tests of the 5B's size."),
    SuiteOption("--write-pictures", "FOLDER", Path, None, "Folder for pictures of the page (docs/images)."),
)


def option_value(config: pytest.Config, name: str) -> Any:
    """Return the value of an option; `Config.getoption` is typed as if every option could be None."""
    return config.getoption(name)
