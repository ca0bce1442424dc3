"""Import of large modules before a command needs them."""

from __future__ import annotations

import gc
import importlib
import sys


def preload(*modules: str) -> None:
    """Import modules with the garbage collector paused, and exempt what they created from later collections.

    Modules create many objects, nearly all of which stay. The collector would examine them again and again, which takes
    0.15 s for torch.
    """
    missing = [module for module in modules if module not in sys.modules]
    if not missing:
        return
    gc.disable()
    try:
        for module in missing:
            importlib.import_module(module)
        gc.freeze()
    finally:
        gc.enable()
