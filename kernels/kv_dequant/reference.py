"""Fill a slot of a 4-bit KV cache and rebuild keys and values from it: the definition, in plain torch.

Shapes as in `format`: S slots, B samples, L tokens of a chunk, N heads, K head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longvideo.kernels.nvfp4 import reference as nvfp4
from longvideo.kernels.nvfp4.format import NVFP4Tensor, Rule

if TYPE_CHECKING:
    from longvideo.kernels.kv_dequant.format import QuantizedSlots

KEYS, VALUES = 0, 1


def write_slot(
    slots: QuantizedSlots, slot: int, keys_BLNK: Tensor, values_BLNK: Tensor, rule: Rule = Rule.ADAPTIVE
) -> None:
    """Quantize keys before rotation and values of a chunk into a slot. Every sample has its own tensor scale."""
    mean_BNK = keys_BLNK.float().mean(1).to(torch.bfloat16)
    slots.key_mean[slot] = mean_BNK
    smoothed_BLNK = keys_BLNK.float() - mean_BNK.float().unsqueeze(1)
    for kind, x_BLNK in ((KEYS, smoothed_BLNK), (VALUES, values_BLNK.float())):
        amax_B = x_BLNK.abs().amax((1, 2, 3))
        quantized = nvfp4.quantize(x_BLNK, rule, amax=amax_B[:, None, None, None])
        slots.codes[kind, slot] = quantized.codes
        slots.scales.view(torch.uint8)[kind, slot] = quantized.scales.view(torch.uint8)
        slots.tensor_scale[kind, slot] = quantized.tensor_scale.flatten()


def rebuild(
    slots: QuantizedSlots,
    which: Tensor,
    cos_SLH: Tensor,
    sin_SLH: Tensor,
    keys_BSLNK: Tensor,
    values_BSLNK: Tensor,
) -> None:
    """Write rotated keys and values of some slots into the same slots of a workspace.

    which: slot numbers, int32 [count]. cos, sin: rotation of every token of every slot, float32 [S, L, K/2].
    keys, values: workspace, [B, S, L, N, K]; the other slots do not change. Arithmetic is in float32: code times (scale
        times tensor scale), plus the mean, rotated in interleaved pairs, then rounded once.
    """
    for slot in which.tolist():
        key_BLNK = _dequantize(slots, KEYS, slot) + slots.key_mean[slot].float().unsqueeze(1)
        cos_L1H, sin_L1H = cos_SLH[slot].unsqueeze(1), sin_SLH[slot].unsqueeze(1)
        even, odd = key_BLNK.unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack((even * cos_L1H - odd * sin_L1H, even * sin_L1H + odd * cos_L1H), dim=-1).flatten(-2)
        keys_BSLNK[:, slot] = rotated.to(keys_BSLNK.dtype)
        values_BSLNK[:, slot] = _dequantize(slots, VALUES, slot).to(values_BSLNK.dtype)


def _dequantize(slots: QuantizedSlots, kind: int, slot: int) -> Tensor:
    scale_B111 = slots.tensor_scale[kind, slot][:, None, None, None]
    return nvfp4.dequantize(NVFP4Tensor(slots.codes[kind, slot], slots.scales[kind, slot], scale_B111))
