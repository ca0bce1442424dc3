"""Train, distill and stream causal video diffusion transformers that generate long videos chunk by chunk.

The names below are the public Python API. Each is imported when it is first used, so `import longvideo` does not
import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longvideo.errors import UserError
    from longvideo.infer.pipeline import StreamingPipeline
    from longvideo.infer.script import Script, ShotRequest
    from longvideo.infer.session import Session
    from longvideo.infer.writer import VideoWriter

__version__ = "0.1.0"
__all__ = ["Script", "Session", "ShotRequest", "StreamingPipeline", "UserError", "VideoWriter", "__version__"]

_MODULES = {
    "Script": "longvideo.infer.script",
    "Session": "longvideo.infer.session",
    "ShotRequest": "longvideo.infer.script",
    "StreamingPipeline": "longvideo.infer.pipeline",
    "UserError": "longvideo.errors",
    "VideoWriter": "longvideo.infer.writer",
}
"""The module that defines each public name."""


if not TYPE_CHECKING:  # a type checker that sees this function accepts every name

    def __getattr__(name: str) -> object:
        """Import a public name on first use (PEP 562)."""
        if name not in _MODULES:
            raise AttributeError(f"module 'longvideo' has no attribute {name!r}; expected one of {', '.join(__all__)}")
        value = getattr(importlib.import_module(_MODULES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
