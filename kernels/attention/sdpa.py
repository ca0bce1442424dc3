"""Attention by torch's `scaled_dot_product_attention`: the order in which its kernels are preferred, and which runs."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

HOPPER = (9, 0)
HEAD_DIM, TOKENS = 128, 256
"""Sizes of the attention that torch is asked about; the heads are as wide as those of Wan2.2."""
ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
NAMES = {
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.FLASH_ATTENTION: "torch's flash attention",
    SDPBackend.EFFICIENT_ATTENTION: "torch's memory-efficient attention",
    SDPBackend.MATH: "reference",
}


@dataclass(frozen=True)
class AttentionChoice:
    """The kernel that torch runs.

    name: name of the kernel, None where none can run. rejected: reason for each kernel that does not run.
    """

    name: str | None
    rejected: dict[str, str]


def preferred_attention(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which torch prefers cuDNN's attention: on Hopper it is twice as fast as FlashAttention-2."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < HOPPER:
        return nullcontext()
    return sdpa_kernel(ORDER, set_priority=True)


def choice(device: torch.device, dtype: torch.dtype) -> AttentionChoice:
    """Return the kernel that torch chooses under `preferred_attention`, and why it chooses no other."""
    try:
        q_BNLK = torch.zeros(1, 1, TOKENS, HEAD_DIM, dtype=dtype, device=device)
    except RuntimeError as error:  # the GPU is full, or another process uses it alone
        return AttentionChoice(None, {"torch": str(error).partition("\n")[0]})
    with preferred_attention(device):
        chosen = SDPBackend(torch._fused_sdp_choice(q_BNLK, q_BNLK, q_BNLK))
        usable = {
            SDPBackend.CUDNN_ATTENTION: can_use_cudnn_attention,
            SDPBackend.FLASH_ATTENTION: can_use_flash_attention,
        }
        rejected = {}
        for backend, can_use in usable.items():
            if backend == chosen:
                continue
            if device.type != "cuda":
                rejected[NAMES[backend]] = f"it needs a CUDA device, not {device.type}"
                continue
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                is_usable = can_use(SDPAParams(q_BNLK, q_BNLK, q_BNLK, None, 0.0, False, False), True)
            reasons = [" ".join(str(warning.message).split()) for warning in caught]
            rejected[NAMES[backend]] = (
                f"{NAMES[chosen]} comes first" if is_usable else "; ".join(reasons) or "torch cannot"
            )
    return AttentionChoice(NAMES[chosen], rejected)
