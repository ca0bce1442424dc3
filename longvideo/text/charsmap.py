"""Check a tokenizer's table of character replacements, because the library that reads it does not check it.

SentencePiece's `precompiled_charsmap` consists of the size of a trie in bytes (uint32, little-endian), the trie (uint32
units in the layout of darts-clone), and the replacements, each ended by a zero byte; the values of the trie are offsets
of replacements. A unit has a label in its low 8 bits (bit 31 marks a value), in bit 8 whether a value follows, and in
the other bits an offset, which is shifted by 8 more bits if bit 9 is set. The index of a child is the index of its
parent, xor the parent's offset, xor the child's label.
"""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

HEADER_BYTES, UNIT_BYTES, BLOCK = 4, 4, 256
VALUE_BIT, LEAF_BIT, WIDE_BIT = 1 << 31, 1 << 8, 1 << 9
NODES_AT_ONCE = 1024
MAX_REPLACEMENT = 256
"""Largest allowed length of a replacement in bytes; the longest compatibility form of Unicode has 33."""


def problem(encoded: object) -> str | None:
    """Return what is wrong with a table in base64, such as an index outside of the trie; None for a valid table."""
    if not isinstance(encoded, str):
        return "is not a text in base64"
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        return "is not in base64"
    size = int.from_bytes(data[:HEADER_BYTES], "little")
    if len(data) < HEADER_BYTES or size % (UNIT_BYTES * BLOCK) or not 0 < size <= len(data) - HEADER_BYTES:
        return f"has a trie of {size} bytes, but {len(data)} bytes in all"
    replacements = data[HEADER_BYTES + size :]
    try:
        replacements.decode("utf-8")
    except UnicodeDecodeError:
        return "has replacements that are not UTF-8"
    if max(map(len, replacements.split(b"\0"))) > MAX_REPLACEMENT:
        return f"replaces a character by more than {MAX_REPLACEMENT} bytes"
    units = np.frombuffer(data, dtype="<u4", count=size // UNIT_BYTES, offset=HEADER_BYTES).astype(np.int64)
    starts = np.append((np.frombuffer(replacements, dtype=np.uint8) & 0xC0) != 0x80, True)
    return _walk(units, starts)


def _walk(units: NDArray[np.int64], starts: NDArray[np.bool_]) -> str | None:
    """Visit every reachable unit; return what is wrong. starts: whether a byte of the replacements may begin one."""
    seen = np.zeros(len(units), dtype=bool)
    labels = np.arange(1, BLOCK)
    places = _offsets(units[:1])
    while len(places):
        if places.max() >= len(units):
            return f"leads to unit {places.max()} of {len(units)}"
        places = np.unique(places[~seen[places]])
        seen[places] = True
        reached = []
        for first in range(0, len(places), NODES_AT_ONCE):
            children = places[first : first + NODES_AT_ONCE, None] ^ labels  # within the block of 256
            exists = (units[children] & (VALUE_BIT | 0xFF)) == labels
            child = children[exists]
            below = child ^ _offsets(units[child])
            if len(below) and below.max() >= len(units):
                return f"leads to unit {below.max()} of {len(units)}"
            values = units[below[(units[child] & LEAF_BIT) != 0]] & (VALUE_BIT - 1)
            if len(values) and (values.max() >= len(starts) or not starts[values].all()):
                return "points to no replacement"
            reached.append(below)
        places = np.concatenate(reached) if reached else places[:0]
    return None


def _offsets(units: NDArray[np.int64]) -> NDArray[np.int64]:
    return (units >> 10) << ((units & WIDE_BIT) >> 6)
