"""Attention of the live chunk to the slots in use, in the dtype of the model or in FP8.

Shapes: B samples, L tokens of a chunk, N heads, K head dim, S slots.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from longvideo.errors import UserError
from longvideo.kernels.attention import cudnn_fp8
from longvideo.kernels.attention.reference import attend_fp8
from longvideo.kernels.backends import AttentionPrecision, attention_backend
from longvideo.kernels.fp8.format import FP8Rows
from longvideo.model.attention import attend
from longvideo.quantization.number_formats import FP8_FORMATS

E4M3 = torch.float8_e4m3fn
OUT_SCALE = 8.0
"""Scale applied to attention's output before rounding to E4M3 (max 56, with 3 bits of mantissa down to 0.002)."""
P_SCALE = 256.0
"""Scale applied to the probabilities before rounding to E4M3."""


class SlotAttention(Protocol):
    """Attention of queries to the first slots. dtype: dtype of queries, keys and values."""

    dtype: torch.dtype

    def __call__(
        self, rotated_BLNK: Tensor, keys_BSLNK: Tensor, values_BSLNK: Tensor, num_slots: int
    ) -> Tensor | FP8Rows:
        """Return attention to the first num_slots slots, [B, L, N K]."""
        ...


class PlainAttention:
    """Attention of torch, with the kernel of cuDNN where it is the fastest."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, rotated_BLNK: Tensor, keys_BSLNK: Tensor, values_BSLNK: Tensor, num_slots: int) -> Tensor:
        keys, values = (stored[:, :num_slots].flatten(1, 2) for stored in (keys_BSLNK, values_BSLNK))
        return attend(rotated_BLNK, keys, values).flatten(2)


class FP8Attention:
    """Attention with queries, keys, values and probabilities in E4M3.

    Queries and keys are normalized, so they need no scale. The caller subtracts the mean of the values, see
    `longvideo.streaming.transformer`. "fp8" is cuDNN's kernel, which is planned once for each number of slots;
    "fp8-emulated" is its definition in plain torch.
    """

    dtype = E4M3

    def __init__(self, *, is_emulated: bool) -> None:
        self._is_emulated = is_emulated
        self._planned: dict[int, cudnn_fp8.CudnnFP8Attention] = {}
        self._scales: Tensor | None = None

    def __call__(
        self, rotated_BLNK: Tensor, keys_BSLNK: Tensor, values_BSLNK: Tensor, num_slots: int
    ) -> Tensor | FP8Rows:
        keys, values = (stored[:, :num_slots].flatten(1, 2) for stored in (keys_BSLNK, values_BSLNK))
        if self._is_emulated:
            out = attend_fp8(rotated_BLNK, keys, values, scale_p=P_SCALE, scale_out=OUT_SCALE, out_dtype=E4M3)
        else:
            planned = self._planned.get(num_slots)
            if planned is None:
                planned = self._planned[num_slots] = self._plan(rotated_BLNK, keys, values)
            out = torch.empty_like(rotated_BLNK, dtype=planned.out_dtype)
            planned(rotated_BLNK, keys, values, out)
        if out.dtype != E4M3:
            return out.flatten(2)
        if self._scales is None:
            self._scales = torch.full(out.shape[:2], 1 / OUT_SCALE, device=out.device)
        return FP8Rows(out.flatten(2), self._scales)

    def _plan(self, rotated_BLNK: Tensor, keys: Tensor, values: Tensor) -> cudnn_fp8.CudnnFP8Attention:
        batch, tokens, heads, head_dim = rotated_BLNK.shape
        try:
            return cudnn_fp8.CudnnFP8Attention(
                batch=batch,
                query_tokens=tokens,
                key_tokens=keys.shape[1],
                heads=heads,
                head_dim=head_dim,
                device=rotated_BLNK.device,
                k_strides=keys.stride(),
                v_strides=values.stride(),
                scale_p=P_SCALE,
                scale_out=OUT_SCALE,
            )
        except ValueError as error:
            raise UserError(f"attention fp8 cannot run: {error}; use --attention bf16") from error


def slot_attention(name: AttentionPrecision, device: torch.device, dtype: torch.dtype) -> SlotAttention:
    """Return attention in a number format; "bf16" is the dtype of the model.

    Raises UserError on a device where it cannot run.
    """
    if name not in FP8_FORMATS:
        return PlainAttention(dtype)
    backend = attention_backend(name, device)
    if backend.name is None:
        raise UserError(f"attention {name} cannot run: {backend.reason}")
    return FP8Attention(is_emulated=backend.is_emulated)
