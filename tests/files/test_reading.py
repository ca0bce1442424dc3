"""Text is read within bounds, and what cannot be read is an error with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from longvideo.errors import UserError
from longvideo.files import check_text, read_lines, read_text


def test_text_is_read_with_and_without_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone\u2028two\r\nthree".encode())
    assert read_lines(path, what="prompts file") == ["one\u2028two", "three"]


def test_text_that_is_no_utf_8_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"one\ntwo\n\xff")
    with pytest.raises(UserError, match=r"prompts\.txt:3 is not UTF-8 text \(byte 0xff\)"):
        read_text(path, what="prompts file")


def test_an_endless_file_is_refused() -> None:
    with pytest.raises(UserError, match="more than 1,000 bytes"):
        read_text(Path("/dev/zero"), what="script", max_bytes=1000)


def test_half_a_character_is_refused() -> None:
    check_text("a \U0001f600 ball", "the prompt")
    with pytest.raises(UserError, match=r"the prompt is not valid text: half a character \(U\+D83D\) follows 'a '"):
        check_text("a \ud83d ball", "the prompt")
