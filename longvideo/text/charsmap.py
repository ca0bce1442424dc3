"""Check a tokenizer's table of character replacements before a library that trusts it reads it.

SentencePiece's `precompiled_charsmap` is the number of bytes of a trie (uint32, little-endian), the trie (uint32 units,
as darts-clone lays them out), and the replacements, each ended by a zero byte, into which the trie's values point. A
unit holds a label in its low 8 bits (bit 31 marks a value), in bit 8 whether a value follows, and in the rest an
offset, shifted by 8 more where bit 9 is set. A child lies at its parent's place, xor that one's offset, xor its label.
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
"""Bytes; the longest of Unicode's compatibility forms has 33."""


def problem(encoded: object) -> str | None:
    """Say what is wrong with a table in base64: a place outside of it, or a replacement that is too long."""
    if not isinstance(encoded, str):
        return "is no text in base64"
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        return "is not in base64"
    size = int.from_bytes(data[:HEADER_BYTES], "little")
    if len(data) < HEADER_BYTES or size % (UNIT_BYTES * BLOCK) or not 0 < size <= len(data) - HEADER_BYTES:
        return f"says that its trie has {size} bytes, and has {len(data)} in all"
    replacements = data[HEADER_BYTES + size :]
    try:
        replacements.decode("utf-8")
    except UnicodeDecodeError:
        return "holds replacements that are not UTF-8"
    if max(map(len, replacements.split(b"\0"))) > MAX_REPLACEMENT:
        return f"replaces a character by more than {MAX_REPLACEMENT} bytes"
    units = np.frombuffer(data, dtype="<u4", count=size // UNIT_BYTES, offset=HEADER_BYTES).astype(np.int64)
    starts = np.append((np.frombuffer(replacements, dtype=np.uint8) & 0xC0) != 0x80, True)
    return _walk(units, starts)


def _walk(units: NDArray[np.int64], starts: NDArray[np.bool_]) -> str | None:
    """Visit every place that some text leads to. starts: whether a value may point to a byte of the replacements."""
    seen = np.zeros(len(units), dtype=bool)
    labels = np.arange(1, BLOCK)
    places = _offsets(units[:1])
    while len(places):
        if places.max() >= len(units):
            return f"leads to unit {places.max()} of {len(units)}"
        places = np.unique(places[~seen[places]])
        seen[places] = True
        found = []
        for first in range(0, len(places), NODES_AT_ONCE):
            children = places[first : first + NODES_AT_ONCE, None] ^ labels  # within the block of 256
            there = (units[children] & (VALUE_BIT | 0xFF)) == labels
            child = children[there]
            below = child ^ _offsets(units[child])
            if len(below) and below.max() >= len(units):
                return f"leads to unit {below.max()} of {len(units)}"
            values = units[below[(units[child] & LEAF_BIT) != 0]] & (VALUE_BIT - 1)
            if len(values) and (values.max() >= len(starts) or not starts[values].all()):
                return "points to no replacement"
            found.append(below)
        places = np.concatenate(found) if found else places[:0]
    return None


def _offsets(units: NDArray[np.int64]) -> NDArray[np.int64]:
    return (units >> 10) << ((units & WIDE_BIT) >> 6)
