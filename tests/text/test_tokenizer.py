"""Tokenizer files that could exhaust the memory or end the process are refused in one line, in little memory."""

from __future__ import annotations

import base64
import copy
import json
import os
import re
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longvideo.errors import CheckpointError, UserError
from longvideo.text import charsmap
from longvideo.text.panics import guarded
from longvideo.text.tokenizer import encode, load_tokenizer, save_tokenizer, word_tokenizer
from tests.checkpoint import small

WORDS = ("a", "red", "ball")
ROWS = 64
MAX_GROWTH_BYTES = 200 * 2**20


def charsmap_of(replacement: bytes = b"b\0", **units: int) -> str:
    """Return a table that replaces "a". units: other values of its trie, by index."""
    trie = np.zeros(256, dtype="<u4")
    trie[97] = 97 | 1 << 8 | 1 << 10  # the child for "a", whose value is at 97 xor 1
    trie[96] = 1 << 31
    for place, unit in units.items():
        trie[int(place.removeprefix("unit_"))] = unit
    data = trie.tobytes()
    return base64.b64encode(len(data).to_bytes(4, "little") + data + replacement).decode()


def precompiled(table: str) -> dict[str, Any]:
    return {"normalizer": {"type": "Precompiled", "precompiled_charsmap": table}}


def replace_by(content: str, pattern: dict[str, str], times: int = 1) -> dict[str, Any]:
    member = {"type": "Replace", "pattern": pattern, "content": content}
    return {"normalizer": {"type": "Sequence", "normalizers": [member] * times}}


def template(single: list[Any], ids: list[int] | None = None) -> dict[str, Any]:
    special = {"</s>": {"id": "</s>", "ids": ids or [1], "tokens": ["</s>"]}}
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}]
    return {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": pair,
            "special_tokens": special,
        }
    }


TEXT, OTHER_TEXT = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
THE_END = {"SpecialToken": {"id": "</s>", "type_id": 0}}
BPE = {"type": "BPE", "vocab": {"<pad>": 0, "</s>": 1, "a": 2, "aa": 3}, "merges": [["a", "a"]]}
UNIGRAM = {"type": "Unigram", "unk_id": None, "vocab": [["<pad>", 0.0], ["</s>", 0.0], ["a", -1.0]]}
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "an id of two billion": ({"vocab": {"zzz": 2_000_000_000}}, "it has the id 2000000000; expected 0 to 63"),
    "the largest id": ({"vocab": {"zzz": 2**32 - 1}}, "it has the id 4294967295"),
    "an id below zero": ({"vocab": {"zzz": -1}}, "it has the id -1"),
    "an id that is true": ({"vocab": {"zzz": True}}, "it has the id True"),
    "an added token far away": ({"added_tokens": [{"id": 10**9, "content": "<q>"}]}, "it has the id 1000000000"),
    "a list of unnatural length": ({"model": {"type": "Unigram", "vocab": [["a", 0.0]] * 65}}, "has 65 tokens"),
    "no vocabulary": ({"model": {"type": "WordLevel"}}, "its vocabulary has no tokens"),
    "a template with far ids": (template([TEXT, THE_END], [10**6]), "it has the id 1000000"),
    "a template of many texts": (template([TEXT] * 10**5), "is not a list of at most 16 pieces"),
    "templates of templates": (
        {"post_processor": {"type": "Sequence", "processors": [template([TEXT] * 9)["post_processor"]] * 9}},
        "joins 32 pieces; expected at most 16",
    ),
    "a template for another text": (template([OTHER_TEXT]), "refers to another text"),
    "a template without an end": (template([TEXT]), "does not end '' with </s>"),
    "no post-processor": ({"post_processor": None}, "does not end '' with </s>"),
    "a post-processor of another kind": ({"post_processor": {"type": "BertProcessing"}}, "'BertProcessing'; expected"),
    "words that explode": (replace_by("a" * 3000, {"String": "a"}, 2), "may make a text 9000000 times as long"),
    "a pattern that matches everywhere": (replace_by("a" * 1024, {"Regex": ""}), "1025 times as long"),
    "an empty pattern": (replace_by("a" * 1024, {"String": ""}), "1025 times as long"),
    "a long beginning": ({"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}}, "times as long"),
    "many normalizers": (replace_by("a", {"String": "a"}, 17), "normalizers is not a list of at most 16"),
    "an unknown normalizer": ({"normalizer": {"type": "Reverse"}}, "of the type 'Reverse', which is not supported"),
    "a table that is not in base64": (precompiled("***"), "precompiled_charsmap is not in base64"),
    "a table of two bytes": (precompiled("AQA="), "has a trie of"),
    "a table of 4 GB": (precompiled(base64.b64encode(b"\xff" * 68).decode()), "has a trie of 4294967295 bytes"),
    "a table with a way out": (precompiled(charsmap_of(unit_0=1 << 20)), "leads to unit 1024 of 256"),
    "a table with a far way out": (precompiled(charsmap_of(unit_97=97 | 3 << 9 | 1 << 20)), "leads to unit"),
    "a table with a wrong value": (precompiled(charsmap_of(unit_96=1 << 31 | 99)), "points to no replacement"),
    "a table into a character": (precompiled(charsmap_of("é\0".encode(), unit_96=1 << 31 | 1)), "to no replacement"),
    "a table of long replacements": (precompiled(charsmap_of(b"b" * 257 + b"\0")), "by more than 256 bytes"),
    "a table of other bytes": (precompiled(charsmap_of(b"\xff\0")), "not UTF-8"),
    "dropout": ({"model": {**BPE, "dropout": 0.5}}, "has a dropout"),
    "a long prefix": ({"model": {**BPE, "continuing_subword_prefix": "x" * 10**6}}, "has more than 16 characters"),
    "no token for the unknown": ({"model": UNIGRAM}, "unk_id"),
    "no word for the unknown": ({"unk_token": "nope"}, "Missing"),
    "a broken pattern": (replace_by("a", {"Regex": "((("}), "parenthesis"),
}


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    save_tokenizer(word_tokenizer(WORDS), tmp_path, text_len=16)
    return json.loads((tmp_path / "tokenizer.json").read_text())


def changed(values: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Change keys of the file, or of its model for keys that the file does not have."""
    result = copy.deepcopy(values)
    for key, value in change.items():
        if key == "vocab":
            result["model"]["vocab"].update(value)
        elif key == "unk_token":
            result["model"][key] = value
        else:
            result[key] = value
    return result


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_a_tokenizer_for_this_is_refused(name: str, values: dict[str, Any], tmp_path: Path) -> None:
    change, reason = CASES[name]
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(changed(values, change)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path, rows=ROWS)
    message = str(caught.value)
    assert reason in message and str(file) in message and "\n" not in message and len(message) < 500
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MAX_GROWTH_BYTES


@pytest.mark.parametrize("text", ["", "{}", "[]", "[" * 10**5, '{"model": NaN}', "\x00", "x" * 100])
def test_what_is_no_tokenizer_at_all_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a (usable )?tokenizer"):
        load_tokenizer(tmp_path, rows=ROWS)


def test_of_a_key_that_stands_twice_what_is_checked_is_read(values: dict[str, Any], tmp_path: Path) -> None:
    text = json.dumps(values)
    bad = json.dumps({**values["model"], "vocab": {**values["model"]["vocab"], "zzz": 2_000_000_000}})
    (tmp_path / "tokenizer.json").write_text(f'{{"model": {bad}, {text[1:]}')
    assert encode(load_tokenizer(tmp_path, rows=ROWS), "a red ball").ids[-1] == 1


def test_a_file_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b" " * (64 * 2**20 + 1))
    with pytest.raises(UserError, match=r"tokenizer\.json has more than 67,108,864 bytes"):
        load_tokenizer(tmp_path, rows=ROWS)


def test_a_table_of_replacements_that_is_sound_is_used(values: dict[str, Any], tmp_path: Path) -> None:
    assert charsmap.problem(charsmap_of()) is None
    known = word_tokenizer(["b"]).get_vocab()
    change = {**precompiled(charsmap_of()), "model": {**values["model"], "vocab": known}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed(values, change)))
    tokenizer = load_tokenizer(tmp_path, rows=ROWS)
    assert encode(tokenizer, "a").ids == encode(tokenizer, "b").ids == [known["b"], 1]


def test_a_library_that_panics_is_one_error(capfd: pytest.CaptureFixture[str]) -> None:
    from tokenizers import processors

    tokenizer = word_tokenizer(WORDS)
    tokenizer.post_processor = processors.TemplateProcessing(single="$B </s>", special_tokens=[("</s>", 1)])
    with pytest.raises(CheckpointError, match="index out of bounds"):
        encode(tokenizer, "a red ball")
    assert capfd.readouterr().err == ""


def test_a_pattern_that_backtracks_is_one_error_with_its_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    small.save(tmp_path / "model")
    file = tmp_path / "model" / "tokenizer" / "tokenizer.json"
    file.write_text(json.dumps(changed(json.loads(file.read_text()), replace_by("b", {"Regex": "^(a|aa|aaa)+$"}))))
    encoder = small.ModelFolder.open(tmp_path / "model").load_text_encoder()
    prompt = "a" * 60 + "b"
    message = f"{file} cannot encode the prompt '{'a' * 40}...': Onig: Regex search error: retry-limit-in-match over; "
    for use in (encoder.unknown_words, lambda prompt: encoder.encode([prompt])):
        with pytest.raises(CheckpointError, match=re.escape(message + "change the prompt, or use the tokenizer of")):
            use(prompt)
    assert capfd.readouterr().err == ""
    assert encoder.encode(["a red ball"])[0].isfinite().all()


def test_what_others_print_while_the_library_runs_is_printed_after_it(capfd: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda text: os.write(2, text.encode()), "of another thread\n") == 18
    os.write(2, b"later\n")
    assert capfd.readouterr().err == "of another thread\nlater\n"


def test_a_process_without_standard_error_can_encode(capfd: pytest.CaptureFixture[str]) -> None:
    stderr = os.dup(2)
    os.close(2)
    try:
        ids = guarded(word_tokenizer(WORDS).encode, "a red ball").ids
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
    assert len(ids) == 4 and capfd.readouterr().err == ""
