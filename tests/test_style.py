"""The project's English: no forbidden phrase or name in the tree, and the script that finds them finds them."""

from __future__ import annotations

from pathlib import Path

from tests.style import ROOT, SOURCES, findings


def test_no_file_has_a_forbidden_phrase_or_name() -> None:
    assert [str(finding) for finding in findings([ROOT / name for name in SOURCES])] == []


def test_phrases_are_found_in_comments_strings_and_documents(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        '"""Holds on.\n\nIt lacks a colour."""\nx = 1  # told\nlacks = f"{x} is none"\n', encoding="utf-8"
    )
    page = tmp_path / "page.md"
    page.write_text("The first line.\nA door behind it.\n", encoding="utf-8")
    results = [(finding.path.name, finding.line, finding.text) for finding in findings([module, page])]
    assert results == [
        ("module.py", 3, "lacks"),
        ("module.py", 3, "colour"),
        ("module.py", 4, "told"),
        ("module.py", 5, "is none"),
        ("page.md", 2, "behind "),
        ("page.md", 2, "door"),
    ]


def test_names_of_variables_and_parameters_are_read(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text("found = 1\n\n\ndef f(wanted):\n    return [made for made in wanted]\n", encoding="utf-8")
    assert sorted(finding.text for finding in findings([module])) == ["found", "made", "wanted"]


def test_each_file_is_read_once() -> None:
    paths = [finding.path for finding in findings([ROOT / "longvideo"])]
    assert not any(str(path).startswith(("longvideo/train/", "longvideo/infer/")) for path in paths)
