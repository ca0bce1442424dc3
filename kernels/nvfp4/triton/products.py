"""Dequantization of NVFP4 tensors, and their products."""

# a kernel is launched with options and plain constants, which its function does not declare
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longvideo.kernels.nvfp4.format import ExactOperand, NVFP4Tensor
from longvideo.kernels.nvfp4.triton.arithmetic import GROUP_SIZE, WORD_CODES, decode_scale, decode_words, round_to
from longvideo.kernels.nvfp4.triton.quantizing import check_contiguous

BLOCK_WORDS = 128
"""Words of 8 codes that are dequantized at once: one for each thread, which then stores 16 bytes of bfloat16."""
BLOCK_TILES = 4
"""Number of such blocks in a program."""
BLOCK_M, BLOCK_N, BLOCK_K = 128, 128, 256

_WORD_CODES = tl.constexpr(WORD_CODES)


def exact(
    quantized: NVFP4Tensor, dtype: torch.dtype = torch.bfloat16, *, block_words: int = BLOCK_WORDS
) -> ExactOperand:
    """Return `code x group scale`, exact in bfloat16 and wider dtypes. Bytes moved: 9/16 and the size of dtype."""
    return ExactOperand(_write_out(quantized, None, dtype, block_words), quantized.tensor_scale)


def dequantize(quantized: NVFP4Tensor, dtype: torch.dtype = torch.float32, *, block_words: int = BLOCK_WORDS) -> Tensor:
    """Return the represented values: code x (group scale x tensor scale) in float32, rounded once to dtype.

    Bytes moved: 9/16 and the size of dtype. Raises ValueError for codes or scales that are not contiguous.
    """
    return _write_out(quantized, quantized.tensor_scale, dtype, block_words)


def scaled_product(a: NVFP4Tensor, b: NVFP4Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Multiply a [..., M, K] by the transpose of b [N, K] on FP4 tensor cores: dtype [..., M, N].

    Only for GPUs of compute capability 10.0 or newer; Triton does not compile it for others. Both tensor scales are
    scalars. Raises ValueError for shapes that do not fit.
    """
    inner = a.shape[-1]
    if len(b.shape) != 2 or b.shape[1] != inner:
        raise ValueError(f"cannot multiply {list(a.shape)} by the transpose of {list(b.shape)}; expected [N, {inner}]")
    if a.tensor_scale.numel() != 1 or b.tensor_scale.numel() != 1:
        raise ValueError(
            f"tensor scales are {list(a.tensor_scale.shape)} and {list(b.tensor_scale.shape)}; expected"
            " scalars, since they are applied to the sums"
        )
    for part in (a.codes, a.scales, b.codes, b.scales):
        check_contiguous(part, "an operand of the product")
    rows, columns = a.codes.numel() * 2 // inner, b.shape[0]
    out = torch.empty(*a.shape[:-1], columns, dtype=dtype, device=a.codes.device)
    _scaled_product_kernel[(triton.cdiv(rows, BLOCK_M), triton.cdiv(columns, BLOCK_N))](
        a.codes,
        a.scales.view(torch.uint8),
        a.tensor_scale,
        b.codes,
        b.scales.view(torch.uint8),
        b.tensor_scale,
        out,
        rows,
        columns,
        inner,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        num_warps=8,
    )
    return out


def add_scaled_bias(product: Tensor, scale: Tensor, bias: Tensor | None = None, *, block: int = 4096) -> Tensor:
    """Replace a product of exact operands [..., N] by `product * scale + bias`, rounded once from float32; return it.

    scale: product of both tensor scales, a float32 scalar on the device. bias: [N]. Bytes moved: twice the product.
    Raises ValueError for shapes that do not fit and for a product that is not contiguous.
    """
    check_contiguous(product, "the product")
    if scale.numel() != 1 or scale.dtype != torch.float32:
        raise ValueError(f"scale is {scale.dtype} {list(scale.shape)}; expected a float32 scalar")
    columns = product.shape[-1]
    if bias is not None:
        check_contiguous(bias, "the bias")
        if bias.shape != (columns,):
            raise ValueError(f"bias is {list(bias.shape)}; expected [{columns}] for a product {list(product.shape)}")
    if product.numel():
        grid = (triton.cdiv(product.numel(), block),)
        _scaled_bias_kernel[grid](
            product, scale, bias, product.numel(), columns, BLOCK=block, num_warps=8, enable_fp_fusion=False
        )
    return product


def _write_out(quantized: NVFP4Tensor, tensor_scale: Tensor | None, dtype: torch.dtype, block_words: int) -> Tensor:
    check_contiguous(quantized.codes, "the codes")
    check_contiguous(quantized.scales, "the scales")
    words = quantized.codes.view(torch.int32)
    out = torch.empty(quantized.shape, dtype=dtype, device=words.device)
    per_group = tensor_scale is not None and tensor_scale.numel() > 1
    if per_group:
        assert tensor_scale is not None
        tensor_scale = tensor_scale.expand(quantized.scales.shape).contiguous()
    if words.numel():
        _write_out_kernel[(triton.cdiv(words.numel(), block_words * BLOCK_TILES),)](
            words,
            quantized.scales.view(torch.uint8),
            tensor_scale,
            out,
            words.numel(),
            SCALED=tensor_scale is not None,
            PER_GROUP=per_group,
            TILES=BLOCK_TILES,
            BLOCK=block_words,
            enable_fp_fusion=False,
        )
    return out


@triton.jit
def _write_out_kernel(
    words_ptr,
    scales_ptr,
    tensor_scale_ptr,
    out_ptr,
    num_words,
    SCALED: tl.constexpr,
    PER_GROUP: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    word = tl.arange(0, BLOCK)
    lane = tl.arange(0, _WORD_CODES)
    offset = word[:, None] * _WORD_CODES + lane[None, :]
    tensor_scale = 1.0
    if SCALED and not PER_GROUP:
        tensor_scale = tl.load(tensor_scale_ptr)
    for tile in tl.static_range(TILES):
        first = (tl.program_id(0).to(tl.int64) * TILES + tile) * BLOCK
        inside = word < num_words - first
        words = tl.load(words_ptr + first + word, mask=inside, other=0).to(tl.uint32, bitcast=True)
        group = first // 2 + word // 2
        scale = decode_scale(tl.load(scales_ptr + group, mask=inside, other=0))
        if PER_GROUP:
            tensor_scale = tl.load(tensor_scale_ptr + group, mask=inside, other=0.0)
        if SCALED:
            scale = scale * tensor_scale
        values = round_to(decode_words(words, lane) * scale[:, None], out_ptr.dtype.element_ty)
        tl.store(out_ptr + first * _WORD_CODES + offset, values, mask=inside[:, None])


@triton.jit
def _scaled_product_kernel(
    a_ptr,
    a_scales_ptr,
    a_tensor_scale_ptr,
    b_ptr,
    b_scales_ptr,
    b_tensor_scale_ptr,
    out_ptr,
    rows,
    columns,
    inner,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    byte = tl.arange(0, BLOCK_K // 2)
    group = tl.arange(0, BLOCK_K // GROUP_SIZE)
    row_inside, column_inside = (row < rows)[:, None], (column < columns)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, inner, BLOCK_K):
        codes_left = (byte < (inner - start) // 2)[None, :]
        scales_left = (group < (inner - start) // GROUP_SIZE)[None, :]
        code_offset = start // 2 + byte[None, :]
        scale_offset = start // GROUP_SIZE + group[None, :]
        a = tl.load(a_ptr + row[:, None] * (inner // 2) + code_offset, mask=row_inside & codes_left, other=0)
        b = tl.load(b_ptr + column[:, None] * (inner // 2) + code_offset, mask=column_inside & codes_left, other=0)
        a_offset = row[:, None] * (inner // GROUP_SIZE) + scale_offset
        b_offset = column[:, None] * (inner // GROUP_SIZE) + scale_offset
        a_scale = tl.load(a_scales_ptr + a_offset, mask=row_inside & scales_left, other=0)
        b_scale = tl.load(b_scales_ptr + b_offset, mask=column_inside & scales_left, other=0)
        total = tl.dot_scaled(
            a,
            a_scale.to(tl.float8e4nv, bitcast=True),
            "e2m1",
            b.T,
            b_scale.to(tl.float8e4nv, bitcast=True),
            "e2m1",
            acc=total,
        )
    total = total * (tl.load(a_tensor_scale_ptr) * tl.load(b_tensor_scale_ptr))
    offset = row[:, None] * columns + column[None, :]
    out = round_to(total, out_ptr.dtype.element_ty)
    tl.store(out_ptr + offset, out, mask=row_inside & (column < columns)[None, :])


@triton.jit
def _scaled_bias_kernel(product_ptr, scale_ptr, bias_ptr, count, columns, BLOCK: tl.constexpr) -> None:
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < count
    product = tl.load(product_ptr + offset, mask=inside, other=0.0).to(tl.float32) * tl.load(scale_ptr)
    if bias_ptr is not None:
        product += tl.load(bias_ptr + offset % columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(product_ptr + offset, round_to(product, product_ptr.dtype.element_ty), mask=inside)
