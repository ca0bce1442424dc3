"""Find words and phrases that the project's English avoids; see `docs/glossary.md` for the terms it uses instead.

`python tests/style.py [PATH]...` prints every occurrence in these files and folders, by default in the whole project.
In Python files it reads comments, strings and the names that are bound; in other files the whole text.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = (
    "longvideo",
    "kernels",
    "train",
    "distill",
    "infer",
    "configs",
    "tests",
    "docs",
    "examples",
    "README.md",
    "CONTRIBUTING.md",
    "Makefile",
    "pyproject.toml",
)
SKIPPED = {"weights", "__pycache__", "fixtures"}
SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".html", ".js", ".css", ".sh", ""}

PHRASES = {
    r"behind (?!a (reverse )?proxy|proxies|TLS|the proxy)": "after, or below",
    r"(?:is|are|was|were) (?-i:none)\b": "is not a ..., or there is no ...",
    r"shall\b": "must, will or is to",
    r"(?:go|goes|gone|went|going) on\b": "continue or resume",
    r"be had\b": "be installed, be available",
    r"(?<!there )(?:is|are|was|were) no (?!longer\b|more\b|less\b|such\b)[a-z]+": "is not a ...",
    r"cut short\b": "interrupted, truncated",
    r"(?:whoever|nobody)\b": "the caller, no process: name who acts",
    r"asked (?:for|of)\b": "requested",
    r"looked at\b": "checked, considered",
    r"so many\b": "a number of",
    r"(?:frames|tokens|units) a (?:second|chunk|step|video|cut|layer)\b": "frames per second",
    r"gone with\b": "continued",
    r"lack(?:s|ed|ing)?\b": "is missing, has no",
    r"(?:room|house|roof|building|door|wall|hallway|staircase)s?\b": "package, module, layer, space",
    r"(?:agree|know|want|tell|hear|speak|forget|say)s\b": "things do not act: state what the code does",
    r"(?:told|heard|forgot|forgotten)\b": "given, set, received",
    r"mend(?:s|ed|ing)?\b": "fix, repair, correct",
    r"for ever\b": "always, without end",
    r"beside\b": "next to, besides, in addition to",
    r"(?:anew|alike|thereof|therein|thereby|hence|whilst|meanwhile)\b": "again, both, while",
    r"(?:laid(?! out)|lain|lies|lie)\b": "is, is stored, laid out: stored",
    r"(?:is|are|was|were) not there\b": "does not exist, is missing",
    r"whose (?=[a-z]+ (?:is|are) kept)": "number of ... that ...",
    r"(?:colour|grey|behaviour|centre|neighbour|licence|artefact)\w*\b": "American spelling",
    r"(?:favour|honour|catalogue|analyse|modelled|labelled)\w*(?<!labelledby)\b": "American spelling",
    r"wanted\b": "expected",
    r"(?:quant|normal|optim|organ|recogn|serial|initial|synchron|summar|general|real|local|minim|maxim|util|visual|"
    r"token|random|final|discret|linear|vector|parallel|equal|character|categor|stabil)"
    r"is(?:e|ed|es|er|ers|ing|ation|ations)\b": "American spelling: -ize",
    r"(?:distil|distils)\b": "distill, distills",
}
"""Regular expressions, matched at word boundaries without regard to case, and what to write instead."""
PATTERNS = {re.compile(rf"\b{phrase}", re.IGNORECASE): advice for phrase, advice in PHRASES.items()}
ANY_PHRASE = re.compile(rf"\b(?:{'|'.join(PHRASES)})", re.IGNORECASE)

NAMES = {"told", "found", "wanted", "made", "said", "asked", "given", "heard", "taken", "meant", "gone"}
"""Participles that are not names of variables: `metadata`, `result`, `expected` are."""

EXCEPTIONS = {
    ("*shapeworld*", "wall"): "objects of ShapeWorld bounce off walls",
    ("longvideo/evaluation/showcase.py", "wall"): "objects of ShapeWorld bounce off walls",
    ("*shapeworld/captions.py", "grey"): "captions have both spellings",
    ("Makefile", "wall"): "a prompt of ShapeWorld",
    ("tests/style.py", ""): "it lists the phrases",
    ("tests/test_style.py", ""): "it tests the phrases",
    ("docs/glossary.md", ""): "it may name what a term is not",
    ("CHANGELOG.md", ""): "it is a record",
}
"""Files (a glob) and the phrase that they may hold (empty: any), and why."""


@dataclass(frozen=True)
class Finding:
    """path: relative to the root. line: from 1. text: what was matched."""

    path: Path
    line: int
    text: str
    advice: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text!r}: {self.advice}"


def findings(paths: list[Path]) -> Iterator[Finding]:
    """Yield every forbidden phrase and name in files and folders."""
    for path in _files(paths):
        relative = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        text = path.read_text(encoding="utf-8")
        for line, piece in _python_texts(text) if path.suffix == ".py" else enumerate(text.splitlines(), 1):
            yield from _in_text(relative, line, piece)
        if path.suffix == ".py":
            for line, name in _bound_names(text):
                if name in NAMES:
                    yield Finding(relative, line, name, "name a variable by a noun")


def _files(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_file():
            yield path
        for file in sorted(path.rglob("*")) if path.is_dir() and not path.is_symlink() else []:
            if (
                file.is_file()
                and file.suffix in SUFFIXES
                and not {"weights", "__pycache__", "fixtures"} & set(file.parts)
            ):
                yield file


def _in_text(path: Path, line: int, text: str) -> Iterator[Finding]:
    if not ANY_PHRASE.search(text):
        return
    for offset, part in enumerate(text.splitlines()):
        for pattern, advice in PATTERNS.items():
            for match in pattern.finditer(part):
                if not _is_excepted(path, match.group()):
                    yield Finding(path, line + offset, match.group(), advice)


def _is_excepted(path: Path, text: str) -> bool:
    return any(fnmatch(path.as_posix(), glob) and word in text.lower() for glob, word in EXCEPTIONS)


def _python_texts(source: str) -> Iterator[tuple[int, str]]:
    """Yield comments and strings with the number of their first line."""
    text_tokens = {tokenize.COMMENT, tokenize.STRING}
    text_tokens |= {getattr(tokenize, name) for name in ("FSTRING_MIDDLE",) if hasattr(tokenize, name)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in text_tokens:
            yield token.start[0], token.string


def _bound_names(source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg


def main(arguments: list[str]) -> int:
    """Print what is found; return 1 if there is anything."""
    count = 0
    for finding in findings([Path(argument).resolve() for argument in arguments] or [ROOT / name for name in SOURCES]):
        print(finding)
        count += 1
    print(f"{count} findings", file=sys.stderr)
    return min(count, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
