"""In how many bits a model computes and remembers."""

from __future__ import annotations

from dataclasses import dataclass

from longvideo.errors import UserError

DIFFERENTIABLE_PRECISIONS = ("bf16", "nvfp4", "nvfp4-weights")  # those a frozen backbone can have under adapters
FP8_FORMATS = ("fp8", "fp8-emulated")  # one arithmetic: on FP8 units, and slowly in plain torch on a CPU
PRECISIONS = (*DIFFERENTIABLE_PRECISIONS, *FP8_FORMATS)
KV_CACHES = ("bf16", "nvfp4")
ATTENTIONS = ("bf16", *FP8_FORMATS)


@dataclass(frozen=True)
class NumberFormats:
    """The formats of a transformer and of its cache.

    precision: of the transformer. "bf16" (float32 on a CPU without bfloat16 units); "nvfp4", weights and inputs of the
        blocks' linear layers; "nvfp4-weights", only the weights; "fp8", weights and inputs of these layers in E4M3, a
        scale for each row, without a gradient. None is "nvfp4" for a packed folder, else "bf16".
    kv_cache: of the chunks already made, "bf16" or "nvfp4".
    attention: "bf16", or "fp8" with queries, keys, values and probabilities in E4M3, the cache included.

    "fp8" needs FP8 units and is refused where there are none. "fp8-emulated" computes the same numbers slowly in plain
    torch on a CPU; it is for tests. NVFP4 is emulated exactly wherever FP4 units are missing.
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
            if name == "precision" and value is None:
                continue
            if not isinstance(value, str) or value not in known:
                raise UserError(f"{name} is {value!r}; it must be one of {', '.join(known)}")

    def precision_of(self, *, packed: bool) -> str:
        """Return the precision of a model whose weights are packed in 4 bits or not."""
        return effective_precision(self.precision, packed=packed)


def effective_precision(precision: str | None, *, packed: bool) -> str:
    """Return a precision; None is what a model with packed weights or without has as it is stored."""
    return precision or ("nvfp4" if packed else "bf16")
