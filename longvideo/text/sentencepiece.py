"""Read a SentencePiece model as a tokenizer.json, in bounded memory and without the package sentencepiece.

The file is a protobuf message, ModelProto of github.com/google/sentencepiece (src/sentencepiece_model.proto). Only a
Unigram model is read, as T5 and UMT5 have it. The result is what transformers' converter for T5 makes of such a file.
"""

from __future__ import annotations

import base64
import math
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from longvideo.text.panics import TokenizerError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MAX_BYTES = 64 * 2**20
"""Largest model that is read; that of UMT5 has 4.5 million bytes."""
MAX_VARINT_BYTES = 10
MAX_PIECE_BYTES = 1024
SPACE = "\u2581"
"""Sign that SentencePiece writes for a space."""
UNIGRAM = 1

# numbers of fields
PIECES, TRAINER, NORMALIZER = 1, 2, 3
PIECE_TEXT, PIECE_SCORE, PIECE_TYPE = 1, 2, 3
MODEL_TYPE, SPACE_AFTER, BYTE_FALLBACK = 3, 24, 35
CHARSMAP, ADDS_PREFIX, ESCAPES_SPACES = 2, 3, 5


class WireType(IntEnum):
    """How the value of a field is encoded."""

    VARINT = 0
    FIXED64 = 1
    BYTES = 2
    FIXED32 = 5


class PieceType(IntEnum):
    """What a piece of the vocabulary is."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """An entry of the vocabulary."""

    text: str
    score: float
    type: PieceType


def tokenizer_json(data: bytes, *, end: str) -> dict[str, Any]:
    """Return the content of a tokenizer.json for a SentencePiece model. end: piece that ends every text.

    Raises TokenizerError for anything but a Unigram model with one unknown piece and with `end`.
    """
    if len(data) > MAX_BYTES:
        raise TokenizerError(f"it has {len(data):,} bytes; expected at most {MAX_BYTES:,}")
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == PIECES:
            pieces.append(_piece(_message(value), len(pieces)))
        elif number == TRAINER:
            trainer |= dict(_fields(_message(value)))
        elif number == NORMALIZER:
            normalizer |= dict(_fields(_message(value)))
    return _tokenizer(pieces, trainer, normalizer, end)


def _tokenizer(
    pieces: list[Piece], trainer: Mapping[int, int | bytes], normalizer: Mapping[int, int | bytes], end: str
) -> dict[str, Any]:
    if trainer.get(MODEL_TYPE, UNIGRAM) != UNIGRAM:
        raise TokenizerError(f"its model type is {trainer[MODEL_TYPE]!r}; expected {UNIGRAM}, Unigram")
    if trainer.get(SPACE_AFTER, 0) or not normalizer.get(ESCAPES_SPACES, 1):
        raise TokenizerError("it marks the ends of words, or no spaces; expected marks of the beginnings")
    ids = {piece.text: index for index, piece in enumerate(pieces)}
    if len(ids) != len(pieces):
        raise TokenizerError(f"{len(pieces) - len(ids)} of its pieces occur twice")
    unknown = [index for index, piece in enumerate(pieces) if piece.type is PieceType.UNKNOWN]
    if len(unknown) != 1 or end not in ids:
        raise TokenizerError(f"it has {len(unknown)} unknown pieces; expected one, and the piece {end}")
    steps = [
        {"type": "Strip", "strip_left": False, "strip_right": True},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": SPACE},
    ]
    if table := _message(normalizer.get(CHARSMAP, b"")):
        steps.insert(0, {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()})
    prefix = "always" if normalizer.get(ADDS_PREFIX, 1) else "never"
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": prefix, "split": True}
    text, closing = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": end, "type_id": 0}}
    return {
        "version": "1.0",
        "added_tokens": [_added(index, piece) for index, piece in enumerate(pieces) if _is_added(piece)],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": metaspace,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [text, closing],
            "pair": [text, closing, {"Sequence": {"id": "B", "type_id": 0}}, closing],
            "special_tokens": {end: {"id": end, "ids": [ids[end]], "tokens": [end]}},
        },
        "decoder": metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": unknown[0],
            "vocab": [[piece.text, piece.score] for piece in pieces],
            "byte_fallback": bool(trainer.get(BYTE_FALLBACK, 0)),
        },
    }


def _is_added(piece: Piece) -> bool:
    return piece.type in (PieceType.UNKNOWN, PieceType.CONTROL, PieceType.USER_DEFINED)


def _added(index: int, piece: Piece) -> dict[str, Any]:
    """Return the entry of a piece that is found in a text before it is divided."""
    special = piece.type is not PieceType.USER_DEFINED
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return {"id": index, "content": piece.text, **plain, "normalized": not special, "special": special}


def _piece(message: bytes, index: int) -> Piece:
    fields = dict(_fields(message))
    raw, score, kind = fields.get(PIECE_TEXT), fields.get(PIECE_SCORE, b"\0\0\0\0"), fields.get(PIECE_TYPE, 1)
    if not isinstance(raw, bytes) or not 0 < len(raw) <= MAX_PIECE_BYTES or not isinstance(score, bytes):
        raise TokenizerError(f"its piece {index} has no text of at most {MAX_PIECE_BYTES} bytes, or no score")
    try:
        (number,), text, type_of_piece = struct.unpack("<f", score), raw.decode(), PieceType(_number(kind))
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        raise TokenizerError(f"its piece {index} is not text with a score and a type: {error}") from error
    if not math.isfinite(number) or type_of_piece is PieceType.UNUSED:
        raise TokenizerError(f"its piece {index} has the score {number} and is {type_of_piece.name}; expected a piece")
    return Piece(text, number, type_of_piece)


def _message(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise TokenizerError(f"it has the number {value} in place of a message")
    return value


def _number(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise TokenizerError(f"it has {len(value)} bytes in place of a number")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and value of each field of a message: an int for a varint, else bytes."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        try:
            wire_type = WireType(tag & 7)
        except ValueError:
            raise TokenizerError(f"it has a field of wire type {tag & 7} at byte {place}; it is damaged") from None
        if wire_type is WireType.VARINT:
            value, place = _varint(data, place)
            yield tag >> 3, value
            continue
        size = {WireType.FIXED64: 8, WireType.FIXED32: 4}.get(wire_type)
        if size is None:
            size, place = _varint(data, place)
        if size > len(data) - place:
            raise TokenizerError(f"it ends inside a field of {size} bytes at byte {place}; it is damaged")
        yield tag >> 3, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """Return a number at a place, and the place after it."""
    number = 0
    for count, byte in enumerate(data[place : place + MAX_VARINT_BYTES]):
        number |= (byte & 0x7F) << 7 * count
        if byte < 0x80:
            return number, place + count + 1
    raise TokenizerError(f"it ends inside a number at byte {place}; it is damaged")
