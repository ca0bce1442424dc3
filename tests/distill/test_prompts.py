"""Files of prompts."""

from __future__ import annotations

from pathlib import Path

from longvideo.distill.prompts import read_scripts


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    for name, text in (
        ("a.txt", "a ball\r\na cube\u2028b\n"),
        ("a.jsonl", '{"prompts": ["a ball"]}\n{"prompts": ["a cube b"]}'),
    ):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert read_scripts(tmp_path / name) == [("a ball",), ("a cube b",)]
