"""Files of prompts: what is read, and what is refused with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from longvideo.errors import UserError
from longvideo.text.prompt_file import PromptLine, read_prompt_file


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    for name, text in (
        ("a.txt", "a ball\r\na cube\u2028b\n"),
        ("a.jsonl", '{"prompts": ["a ball"]}\n{"prompts": ["a cube b"]}'),
    ):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert read_prompt_file(tmp_path / name) == [PromptLine(("a ball",)), PromptLine(("a cube b",))]


def test_a_line_of_json_has_shots_and_may_have_seconds_and_a_seed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompts": ["a", "b"], "seconds": 2.5, "seed": 7}\n{"prompts": ["c"]}\n')
    assert read_prompt_file(tmp_path / "a.jsonl") == [PromptLine(("a", "b"), seconds=2.5, seed=7), PromptLine(("c",))]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "is empty; expected a prompt in each line"),
        ("a.txt", "a\n\nb\n", "a.txt:2 has an empty prompt"),
        ("a.jsonl", '{"prompts": ["a"]}\n{"prompts": [', "a.jsonl:2 is not JSON"),
        ("a.jsonl", '{"prompt": "a"}', r'a.jsonl:1 is not an object of the form {"prompts": \["first shot"'),
        ("a.jsonl", '{"prompts": []}', "a.jsonl:1 has an empty prompt"),
        ("a.jsonl", '{"prompts": ["a"], "second": 3}', "unknown key 'second'; the keys are prompts, neg"),
        ("a.jsonl", '{"prompts": ["a"], "negative_prompt": 7}', "a.jsonl:1: negative_prompt is 7; expected text, or"),
        (
            "a.jsonl",
            '{"prompts": ["a"], "negative_prompt": ["b", "c"]}',
            "has 2 negative prompts; expected one",
        ),
        ("a.jsonl", '{"prompts": ["a"], "seconds": 0}', "a.jsonl:1: seconds is 0; expected a number above 0"),
        ("a.jsonl", '{"prompts": ["a"], "seconds": NaN}', "a.jsonl:1: seconds is nan; expected a number above 0"),
        ("a.jsonl", '{"prompts": ["a"], "seed": true}', "a.jsonl:1: seed is True; expected a whole number"),
        ("a.jsonl", '{"prompts": ["a\\ud800"]}', "a.jsonl:1: the prompt is not valid text"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_prompt_file(tmp_path / name)
