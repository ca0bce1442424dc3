"""A SentencePiece model gives the tokens of the package sentencepiece, and a damaged one is one line."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from longvideo.errors import CheckpointError
from longvideo.text.encoder import clean_prompt
from longvideo.text.sentencepiece import MAX_BYTES
from longvideo.text.tokenizer import encode, tokenizer_of_sentencepiece

FIXTURES = Path(__file__).parents[1] / "fixtures"
MODEL = (FIXTURES / "spiece_a.model").read_bytes()
IDS = json.loads((FIXTURES / "spiece_a.json").read_text())
ROWS = 420


def field(number: int, value: bytes | int | float) -> bytes:
    """Return a field of a protobuf message. Numbers must be below 128, and messages and texts below 16384 bytes."""
    if isinstance(value, float):
        return tag(number, 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return tag(number, 0) + bytes([value])
    return tag(number, 2) + bytes([len(value) & 0x7F | 0x80, len(value) >> 7]) + value


def tag(number: int, wire_type: int) -> bytes:
    return bytes([(number & 0xF) << 3 | wire_type | 0x80, number >> 4])


def piece(text: str, score: float = -1.0, kind: int = 1) -> bytes:
    return field(1, field(1, text.encode()) + field(2, score) + field(3, kind))


def model(*pieces: bytes, trainer: bytes = b"", normalizer: bytes = b"") -> bytes:
    special = piece("<pad>", 0.0, 3) + piece("</s>", 0.0, 3) + piece("<unk>", 0.0, 2)
    return special + b"".join(pieces) + field(2, trainer) + field(3, normalizer)


@pytest.mark.parametrize("prompt", IDS)
def test_tokens_are_those_of_sentencepiece(prompt: str) -> None:
    tokenizer = tokenizer_of_sentencepiece(MODEL, rows=ROWS, name="spiece_a")
    assert encode(tokenizer, clean_prompt(prompt)).ids == IDS[prompt]


def test_a_model_built_by_hand_follows_its_options() -> None:
    pieces = [piece("\u2581a", -1.0), piece("b", -2.0), piece("\u2581", -3.0)]
    tokenizer = tokenizer_of_sentencepiece(model(*pieces), rows=8, name="built")
    assert encode(tokenizer, "a bz").ids == [3, 5, 4, 2, 1]
    without = tokenizer_of_sentencepiece(model(*pieces, normalizer=field(3, 0)), rows=8, name="built")
    assert encode(without, "b").ids == [4, 1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it has 0 unknown pieces; expected one, and the piece </s>"),
        (b"\0" * (MAX_BYTES + 1), r"it has 67,108,865 bytes; expected at most 67,108,864"),
        (MODEL[:-3], "it ends inside a field of"),
        (b"\x0b", "it has a field of wire type 3 at byte 1; it is damaged"),
        (b"\xff" * 20, "it ends inside a number at byte 0"),
        (field(1, 5), "it has the number 5 in place of a message"),
        (model(piece("a"), piece("a")), "1 of its pieces occur twice"),
        (model(piece("a", kind=5)), "its piece 3 has the score -1.0 and is UNUSED"),
        (model(piece("a", float("nan"))), "its piece 3 has the score nan"),
        (model(piece("a", kind=9)), "its piece 3 is not text with a score and a type: 9 is not"),
        (model(field(1, field(1, b"\xff") + field(2, 0.0))), "its piece 3 is not text"),
        (model(piece("")), "its piece 3 has no text of at most 1024 bytes"),
        (model(trainer=field(3, 2)), "its model type is 2; expected 1, Unigram"),
        (model(trainer=field(24, 1)), "it marks the ends of words"),
        (model(normalizer=field(2, b"abcdefgh")), "precompiled_charsmap has a trie of"),
        (model(*map(piece, "abcdefgh")), "its vocabulary has 11 tokens; expected at most 10"),
        (piece("a") + model(), r"has <pad> and </s> at ids \(1, 2\); expected \(0, 1\)"),
    ],
)
def test_another_model_is_refused_in_one_line(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        tokenizer_of_sentencepiece(data, rows=10 if data != MODEL[:-3] else ROWS, name="file: spiece_model")
    assert str(error.value).startswith("file: spiece_model") and "\n" not in str(error.value)


def test_changed_bytes_are_refused_or_read_but_raise_nothing_else() -> None:
    for place in range(0, len(MODEL), 97):
        damaged = bytearray(MODEL)
        damaged[place] ^= 0xFF
        try:
            tokenizer_of_sentencepiece(bytes(damaged), rows=ROWS, name="damaged")
        except CheckpointError as error:
            assert str(error).startswith("damaged")
