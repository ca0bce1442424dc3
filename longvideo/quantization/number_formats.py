"""Number formats in which a model computes and in which it keeps the chunks already made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from longvideo.errors import known
from longvideo.kernels.backends import AttentionPrecision, TransformerPrecision
from longvideo.model.cache import CachePrecision

DecoderPrecision = Literal["auto", "fp32", "bf16", "fp8", "fp8-emulated"]
"""Number format of the decoder's convolutions."""

TextPrecision = Literal["bf16", "fp8", "nvfp4"]
"""Number format of the text encoder's weights."""
DifferentiablePrecision = Literal["bf16", "nvfp4", "nvfp4-weights"]
"""Precision of a frozen backbone through which gradients reach adapters."""
FP8_FORMATS = ("fp8", "fp8-emulated")
"""Formats with the arithmetic of FP8: on FP8 units, and slowly in plain torch on a CPU."""
PACKED_CACHES: tuple[CachePrecision, ...] = ("nvfp4", "nvfp4-mixed")
"""Formats of the KV cache that have chunks in 4 bits."""
PRECISIONS: tuple[TransformerPrecision, ...] = get_args(TransformerPrecision)
KV_CACHES: tuple[CachePrecision, ...] = get_args(CachePrecision)
ATTENTIONS: tuple[AttentionPrecision, ...] = get_args(AttentionPrecision)
TEXT_ENCODERS = ("cuda", "cpu", "fp8", "nvfp4")
"""Choices of place and format of the text encoder."""
DECODER_PRECISIONS: tuple[DecoderPrecision, ...] = get_args(DecoderPrecision)


@dataclass(frozen=True)
class NumberFormats:
    """Number formats of a transformer and of its KV cache; `parse` checks those that users name.

    precision: format of the products in the blocks. "bf16" (float32 on a CPU without bfloat16 units); "nvfp4" for
        weights and inputs; "nvfp4-te" for the same with TransformerEngine's products; "nvfp4-weights" for the weights
        alone; "fp8" for weights and inputs in E4M3 with a scale for each row, which has no gradient. None is "nvfp4"
        where the weights are stored in 4 bits, otherwise "bf16".
    kv_cache: format of the keys and values of the chunks already made. "bf16" is the dtype of the model; "nvfp4" has
        all chunks in 4 bits; "nvfp4-mixed" too, and reads the sink and the newest finished chunk as in "bf16".
    attention: "bf16", or "fp8" for queries, keys, values and probabilities in E4M3, the cache included.
    decoder: "fp32", "bf16", or "fp8" for large convolutions in E4M3 and the rest in bf16. "auto" is bf16 on a GPU, and
        the faster of fp32 and bf16 on a CPU, which is measured when the model is loaded.
    text_encoder: "bf16" is the dtype of the model; "fp8" and "nvfp4" have weights in 8 or 4 bits, which are dequantized
        for each product and need no FP8 or FP4 units.

    "fp8" needs FP8 units and "nvfp4-te" FP4 units; they are refused on devices without them. "fp8-emulated" computes
    the same numbers slowly in plain torch on a CPU; it is for tests. "nvfp4" is emulated exactly on devices without
    FP4 units.
    """

    precision: TransformerPrecision | None = None
    kv_cache: CachePrecision = "bf16"
    attention: AttentionPrecision = "bf16"
    decoder: DecoderPrecision = "auto"
    text_encoder: TextPrecision = "bf16"

    @classmethod
    def parse(
        cls,
        precision: str | None = None,
        kv_cache: str = "bf16",
        attention: str = "bf16",
        decoder: str = "auto",
        text_encoder: str | None = None,
    ) -> NumberFormats:
        """Return the formats with these names. Raises UserError for a name that is unknown.

        text_encoder: "fp8" or "nvfp4"; None, "cuda" and "cpu", which are places, mean "bf16".
        """
        text = None if text_encoder is None else known("text_encoder", text_encoder, TEXT_ENCODERS)
        return cls(
            None if precision is None else known("precision", precision, PRECISIONS),
            known("kv_cache", kv_cache, KV_CACHES),
            known("attention", attention, ATTENTIONS),
            known("decoder_precision", decoder, DECODER_PRECISIONS),
            text if text == "fp8" or text == "nvfp4" else "bf16",
        )

    def precision_of(self, *, packed: bool) -> TransformerPrecision:
        """Return the precision of a model. packed: whether its weights are stored in 4 bits."""
        return self.precision or ("nvfp4" if packed else "bf16")

    def effective(self, *, packed: bool) -> NumberFormats:
        """Return these formats with a precision that is not None. packed: as in `precision_of`."""
        return replace(self, precision=self.precision_of(packed=packed))
