"""Packages that are installed only with an extra of the distribution."""

from __future__ import annotations

from importlib.util import find_spec

from longvideo.errors import UserError


def require(package: str, *, extra: str, purpose: str) -> None:
    """Raise UserError with the command to install an extra if its package is missing. The package is not imported."""
    if find_spec(package) is None:
        raise UserError(f"{purpose} needs the package {package}; run: pip install 'longvideo[{extra}]'")
