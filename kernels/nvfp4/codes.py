"""How NVFP4 codes and group scales are stored as bytes."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from longvideo.kernels.nvfp4.format import E2M1_MAX, E2M1_VALUES

SWIZZLE_ROWS, SWIZZLE_COLUMNS = 128, 4


def pack(codes: Tensor) -> Tensor:
    """Pack uint8 codes [..., K] into bytes [..., K/2], two in each, the first in the low nibble."""
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return low | (high << 4)


def unpack(packed: Tensor) -> Tensor:
    """Return the uint8 codes [..., K] in bytes [..., K/2]."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def encode(values: Tensor) -> Tensor:
    """Return the uint8 codes of E2M1 values, with the sign of zero."""
    # NaN becomes an arbitrary integer, which must not index outside the table
    index = (values.abs() * 2).to(torch.int32).clamp(0, int(E2M1_MAX * 2))
    magnitudes = _encoding_table(values.device)[index]
    return magnitudes | (torch.signbit(values).to(torch.uint8) << 3)


def decode(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the E2M1 values of uint8 codes."""
    return _decoding_table(codes.device, dtype)[codes.int()]


def swizzle_scales(scales: Tensor) -> Tensor:
    """Reorder E4M3 scales [R, C] as Blackwell's tensor cores read them: flat uint8, tiles of 128 x 4 padded with zeros.

    Inside a tile, row r and column c are at byte 16 (r mod 32) + 4 (r div 32) + c. Source: cuBLAS documentation, "1D
    block scaling factors layout".
    """
    rows, columns = scales.shape
    tile_rows, tile_columns = -(-rows // SWIZZLE_ROWS), -(-columns // SWIZZLE_COLUMNS)
    padded = scales.new_zeros(tile_rows * SWIZZLE_ROWS, tile_columns * SWIZZLE_COLUMNS, dtype=torch.uint8)
    padded[:rows, :columns] = scales.view(torch.uint8)
    return padded.view(tile_rows, 4, 32, tile_columns, 4).permute(0, 3, 2, 1, 4).flatten()


def unswizzle_scales(swizzled: Tensor, rows: int, columns: int) -> Tensor:
    """Return the scales [rows, columns] that `swizzle_scales` reordered, float8_e4m3fn."""
    tile_rows, tile_columns = -(-rows // SWIZZLE_ROWS), -(-columns // SWIZZLE_COLUMNS)
    expected = tile_rows * tile_columns * SWIZZLE_ROWS * SWIZZLE_COLUMNS
    if swizzled.numel() != expected:
        raise ValueError(f"got {swizzled.numel()} swizzled scales; expected {expected} for {rows} x {columns}")
    tiles = swizzled.view(torch.uint8).view(tile_rows, tile_columns, 32, 4, 4).permute(0, 3, 2, 1, 4)
    padded = tiles.reshape(tile_rows * SWIZZLE_ROWS, tile_columns * SWIZZLE_COLUMNS)
    return padded[:rows, :columns].contiguous().view(torch.float8_e4m3fn)


def decode_bytes(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `decode(unpack(codes), dtype)`; the two values of a byte are looked up at once, as one number."""
    pairs = torch.index_select(_pair_table(codes.device, dtype), 0, codes.flatten().int())
    return pairs.view(dtype).view(*codes.shape[:-1], -1)


@functools.cache
def _pair_table(device: torch.device, dtype: torch.dtype) -> Tensor:
    pairs = decode(unpack(torch.arange(256, dtype=torch.uint8).unsqueeze(1)), dtype)
    whole = {2: torch.int32, 4: torch.int64, 8: torch.complex128}[dtype.itemsize]
    return pairs.contiguous().view(whole).flatten().to(device)


@functools.cache
def _encoding_table(device: torch.device) -> Tensor:
    table = torch.zeros(int(E2M1_MAX * 2) + 1, dtype=torch.uint8)
    for code, value in enumerate(E2M1_VALUES):
        table[int(value * 2)] = code
    return table.to(device)


@functools.cache
def _decoding_table(device: torch.device, dtype: torch.dtype) -> Tensor:
    positive = torch.tensor(E2M1_VALUES, dtype=dtype)
    return torch.cat((positive, -positive)).to(device)
