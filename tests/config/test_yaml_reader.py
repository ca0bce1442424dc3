"""YAML that is hostile or damaged costs little and is one line; what OmegaConf reads as a number stays one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from longvideo.config.yaml_reader import parse_yaml, read_yaml
from longvideo.errors import UserError

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
CHAIN = "- &a0 [x]\n" + "".join(f"- &a{number} [*a{number - 1}]\n" for number in range(1, 5000))
BAD = {
    "alias bomb": (BOMB, "aliases make more than 200,000 values"),
    "merge bomb": (MERGES, "aliases make more than 200,000 values"),
    "deep list": ("[" * 150, "nested more than 100 deep"),
    # PyYAML 6.0.4 has a limit of its own
    "very deep list": ("[" * 20_000, "nested more than 100 deep|exceeded maximum nesting depth"),
    "deep blocks": ("".join(" " * depth + "a:\n" for depth in range(300)), "line 101: values are nested"),
    "deep through aliases": (CHAIN, "nest them more than 100 deep"),
    "recursion": ("&a [*a]", "a value holds itself"),
    "5000 digits": ("a: 1\nb: " + "9" * 5000, "line 2: a number has 5,000 digits; at most 40"),
    "hexadecimal": ("0x" + "f" * 5000, "a number has 5,002 digits"),
    "duplicate": ("a: 1\na: 2", "line 2: found duplicate key 'a'"),
    "false number": ("!!int abc", "this is not a value of the type int"),
    "long float": ("!!float " + ":".join(["1"] * 10_000) + ".5", "this is not a value of the type float"),
    "false date": ("!!timestamp abc", "not a value of the type timestamp"),
    "false truth": ("!!bool abc", "not a value of the type bool"),
    "object": ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "unknown alias": ("*a", "found undefined alias"),
    "list as key": ("? [a]\n: b", "unhashable key"),
    "two documents": ("a: 1\n---\nb: 2", "line 2: but found another document"),
    "control character": ("a: \x01", "control characters are not allowed"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_yaml_is_one_short_line(name: str) -> None:
    text, message = BAD[name]
    with pytest.raises(UserError, match=message) as caught:
        parse_yaml(text, where="shots.yaml")
    error = str(caught.value)
    assert error.startswith("shots.yaml: not valid YAML") and "\n" not in error and len(error) < 200


def test_half_a_character_is_refused() -> None:
    with pytest.raises(UserError, match="command line is not valid text: the byte 0xff"):
        parse_yaml("name: a\udcff", where="command line")


def test_values_are_those_of_configurations() -> None:
    text = "{a: 1e-4, b: 1.5, c: .inf, d: 2020-01-01, e: 1_000, f: yes, g: 0x1f, h: -1E3, i: '1e-4', j: ~}"
    assert parse_yaml(text, where="").value == {
        "a": 1e-4,
        "b": 1.5,
        "c": float("inf"),
        "d": "2020-01-01",
        "e": 1000,
        "f": True,
        "g": 31,
        "h": -1000.0,
        "i": "1e-4",
        "j": None,
    }
    assert parse_yaml("base: &base {x: 1}\nmore: {<<: *base, y: 2}", where="").value["more"] == {"x": 1, "y": 2}
    assert parse_yaml("", where="").value is None


def test_items_know_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "shots.yaml"
    path.write_bytes("\ufeff# shots\n- {prompt: a}\n\n- prompt: b\n  seconds: 3\n".encode())
    document = read_yaml(path, what="script")
    assert document.value == [{"prompt": "a"}, {"prompt": "b", "seconds": 3}] and document.lines == (2, 4)


def test_a_file_without_end_is_refused_in_little_memory() -> None:
    code = (
        "import resource, pathlib; from longvideo.errors import UserError\n"
        "from longvideo.config.yaml_reader import read_yaml\n"
        "used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: read_yaml(pathlib.Path('/dev/zero'), what='script')\n"
        "except UserError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    message, kibibytes = done.stdout.splitlines()
    assert "the script /dev/zero has more than 4,194,304 bytes" in message and int(kibibytes) < 64 * 1024
