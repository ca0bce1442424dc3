"""In how many bits a model computes and remembers."""

from __future__ import annotations

from dataclasses import dataclass

from longvideo.errors import UserError

DIFFERENTIABLE_PRECISIONS = ("bf16", "nvfp4", "nvfp4-weights")  # those a frozen backbone can have under adapters
PRECISIONS = (*DIFFERENTIABLE_PRECISIONS, "fp8")
KV_CACHES = ("bf16", "nvfp4")
ATTENTIONS = ("bf16", "fp8")


@dataclass(frozen=True)
class NumberFormats:
    """The formats of a transformer and of its cache.

    precision: of the transformer. "bf16" (float32 on a CPU without bfloat16 units); "nvfp4", weights and inputs of the
        blocks' linear layers; "nvfp4-weights", only the weights; "fp8", weights and inputs of these layers in E4M3, a
        scale for each row, without a gradient. None is "nvfp4" for a packed folder, else "bf16".
    kv_cache: of the chunks already made, "bf16" or "nvfp4".
    attention: "bf16", or "fp8" with queries, keys, values and probabilities in E4M3, the cache included.
    """

    precision: str | None = None
    kv_cache: str = "bf16"
    attention: str = "bf16"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("precision", self.precision, PRECISIONS),
            ("kv_cache", self.kv_cache, KV_CACHES),
            ("attention", self.attention, ATTENTIONS),
        ):
            if value is not None and value not in known:
                raise UserError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
