"""Packages that only an extra of the distribution brings."""

from __future__ import annotations

from importlib.util import find_spec

from longvideo.errors import UserError


def require(package: str, *, extra: str, purpose: str) -> None:
    """Raise UserError, which says what to install, where the package of an extra is missing. It is not imported."""
    if find_spec(package) is None:
        raise UserError(f"{purpose} needs the package {package}; run: pip install 'longvideo[{extra}]'")
