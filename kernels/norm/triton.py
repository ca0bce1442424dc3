"""Triton kernels between the products of a transformer block; `reference` defines them.

A program holds a whole token, so every value is read once and written once. Shapes: B samples, L tokens, D model dim, T
frames of L/T tokens each.
"""

# a kernel is launched with options and plain constants, which its function does not declare
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longvideo.kernels.norm.reference import E4M3_MAX
from longvideo.kernels.nvfp4.triton.arithmetic import round_to

WARPS = 4

_E4M3_MAX = tl.constexpr(E4M3_MAX)


def add_norm(
    h_BLD: Tensor,
    update_BLD: Tensor | None,
    gate: Tensor | None,
    multiplier: Tensor | None,
    shift: Tensor | None,
    out_BLD: Tensor | None,
    scales_BL: Tensor | None = None,
    *,
    eps: float,
    bias_D: Tensor | None = None,
) -> None:
    """Add gate x (update + bias) to h in place, and write LayerNorm(h) x multiplier + shift to out.

    Bytes moved, where E is the size of an element: E for each element of h, update, the new h and out, if not None.
    Raises ValueError for tensors that are not contiguous or whose shapes do not match.
    """
    batch, length, dim = h_BLD.shape
    for name, x in (("h", h_BLD), ("update", update_BLD), ("out", out_BLD)):
        if x is not None and (x.shape != h_BLD.shape or not x.is_contiguous()):
            raise ValueError(f"{name} is {list(x.shape)} with strides {list(x.stride())}; expected {list(h_BLD.shape)}")
    frames = 1
    factors = []
    for name, factor in (("gate", gate), ("multiplier", multiplier), ("shift", shift)):
        if factor is None:
            factors.append((h_BLD, 0, 0))
            continue
        if factor.shape[-1] != dim or factor.stride(-1) != 1 or factor.ndim not in (1, 3):
            raise ValueError(f"{name} is {list(factor.shape)}; expected [{dim}] or [{batch}, frames, {dim}]")
        if factor.ndim == 3:
            if factor.shape[0] != batch or frames not in (1, factor.shape[1]) or length % factor.shape[1]:
                raise ValueError(f"{name} is {list(factor.shape)}; expected frames that divide h {list(h_BLD.shape)}")
            frames = factor.shape[1]
        factors.append((factor, *(factor.stride()[:2] if factor.ndim == 3 else (0, 0))))
    quantizes = out_BLD is not None and out_BLD.dtype is torch.float8_e4m3fn
    if out_BLD is not None and (multiplier is None or shift is None or quantizes != (scales_BL is not None)):
        raise ValueError(
            "out needs a multiplier and a shift; scales must be given if out is float8_e4m3fn, and only then"
        )
    _add_norm[(length, batch)](
        h_BLD,
        h_BLD if update_BLD is None else update_BLD,
        *factors[0],
        *factors[1],
        *factors[2],
        h_BLD if out_BLD is None else out_BLD,
        h_BLD if scales_BL is None else scales_BL,
        h_BLD if bias_D is None else bias_D,
        length,
        length // frames,
        dim,
        eps,
        HAS_UPDATE=update_BLD is not None,
        HAS_BIAS=bias_D is not None,
        HAS_GATE=gate is not None,
        HAS_OUT=out_BLD is not None,
        QUANTIZES=quantizes,
        WIDTH=triton.next_power_of_2(dim),
        num_warps=WARPS,
    )


def rms_norm(x_BLD: Tensor, gamma_D: Tensor, out_BLD: Tensor, *, eps: float) -> None:
    """Write the RMS norm of every token, times gamma, to out, which may be x.

    Tokens need not be adjacent. Bytes moved: 2 E for each of B L D. Raises ValueError for shapes that do not match.
    """
    batch, length, dim = x_BLD.shape
    for name, x in (("x", x_BLD), ("out", out_BLD)):
        if x.shape != x_BLD.shape or x.stride(-1) != 1:
            raise ValueError(f"{name} is {list(x.shape)} with strides {list(x.stride())}; expected {list(x_BLD.shape)}")
    _rms_norm[(length, batch)](
        x_BLD,
        gamma_D,
        out_BLD,
        *x_BLD.stride()[:2],
        *out_BLD.stride()[:2],
        dim,
        eps,
        WIDTH=triton.next_power_of_2(dim),
        num_warps=WARPS,
    )


@triton.jit
def _add_norm(
    h_pointer,
    update_pointer,
    gate_pointer,
    gate_batch,
    gate_frame,
    multiplier_pointer,
    multiplier_batch,
    multiplier_frame,
    shift_pointer,
    shift_batch,
    shift_frame,
    out_pointer,
    scales_pointer,
    bias_pointer,
    length,
    tokens_per_frame,
    dim,
    eps,
    HAS_UPDATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_OUT: tl.constexpr,
    QUANTIZES: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    token, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    frame = token // tokens_per_frame
    channel = tl.arange(0, WIDTH)
    inside = channel < dim
    row = sample * length + token
    place = row * dim + channel
    x = tl.load(h_pointer + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_UPDATE:
        update = tl.load(update_pointer + place, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            update += tl.load(bias_pointer + channel, mask=inside, other=0.0).to(tl.float32)
        if HAS_GATE:
            gate_pointer += sample * gate_batch + frame * gate_frame
            update *= tl.load(gate_pointer + channel, mask=inside, other=0.0).to(tl.float32)
        total = round_to(x + update, h_pointer.dtype.element_ty)
        tl.store(h_pointer + place, total, mask=inside)
        x = total.to(tl.float32)
    if HAS_OUT:
        mean = tl.sum(x, axis=0) / dim
        x = tl.where(inside, x - mean, 0.0)
        x *= 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / dim + eps)
        multiplier_pointer += sample * multiplier_batch + frame * multiplier_frame
        shift_pointer += sample * shift_batch + frame * shift_frame
        x *= tl.load(multiplier_pointer + channel, mask=inside, other=0.0).to(tl.float32)
        x += tl.load(shift_pointer + channel, mask=inside, other=0.0).to(tl.float32)
        if QUANTIZES:
            largest = tl.max(tl.abs(x), axis=0)
            scale = tl.where(largest > 0, largest / _E4M3_MAX, 1.0)
            tl.store(scales_pointer + row, scale)
            x = tl.minimum(tl.maximum(x * (1.0 / scale), -_E4M3_MAX), _E4M3_MAX)
        tl.store(out_pointer + place, round_to(x, out_pointer.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm(
    x_pointer,
    gamma_pointer,
    out_pointer,
    x_batch,
    x_token,
    out_batch,
    out_token,
    dim,
    eps,
    WIDTH: tl.constexpr,
) -> None:
    token, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    inside = channel < dim
    x = tl.load(x_pointer + sample * x_batch + token * x_token + channel, mask=inside, other=0.0).to(tl.float32)
    x *= 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / dim + eps)
    x *= tl.load(gamma_pointer + channel, mask=inside, other=0.0).to(tl.float32)
    out_pointer += sample * out_batch + token * out_token + channel
    tl.store(out_pointer, round_to(x, out_pointer.dtype.element_ty), mask=inside)
