"""In how many bits a model computes and remembers."""

from __future__ import annotations

from dataclasses import dataclass

from longvideo.errors import UserError

PRECISIONS = ("bf16", "nvfp4", "nvfp4-weights")
KV_CACHES = ("bf16", "nvfp4")


@dataclass(frozen=True)
class NumberFormats:
    """The formats of a transformer and of its cache.

    precision: of the transformer. "bf16" (float32 on a CPU without bfloat16 units); "nvfp4", weights and inputs of the
        blocks' linear layers; "nvfp4-weights", only the weights. None is "nvfp4" for a packed folder, else "bf16".
    kv_cache: of the chunks already made, "bf16" or "nvfp4".
    """

    precision: str | None = None
    kv_cache: str = "bf16"

    def __post_init__(self) -> None:
        for name, value, known in (("precision", self.precision, PRECISIONS), ("kv_cache", self.kv_cache, KV_CACHES)):
            if value is not None and value not in known:
                raise UserError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
