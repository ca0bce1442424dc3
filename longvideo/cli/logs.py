"""Messages of the library's loggers, as commands show them."""

from __future__ import annotations

import logging
import sys
from typing import TextIO


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to the standard error of the moment at which a message is logged, which tests replace."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # pyright: ignore[reportIncompatibleVariableOverride]
        return sys.stderr


def show_messages(*, is_main: bool = True) -> None:
    """Print messages of loggers on standard error: from INFO for longvideo, from WARNING for other packages.

    is_main: whether this process prints for all ranks; the others show only warnings.
    """
    logger = logging.getLogger("longvideo")
    logger.setLevel(logging.INFO if is_main else logging.WARNING)
    if not any(isinstance(handler, _StandardError) for handler in logger.handlers):
        handler = _StandardError()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
