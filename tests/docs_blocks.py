"""Code in the documentation: its blocks, their marks, and the commands in them.

A block is indented by four spaces or fenced. The line of text before it is its mark, a comment that readers do not see:

    <!-- test: run -->                            each command, or the Python, is run
    <!-- test: run, slow -->                      the same, by the slow tests
    <!-- test: run, "--seconds 1" for "--seconds 60" -->        with other words in it
    <!-- test: parse, because it takes a GPU -->  commands and options exist, configurations load, imports work
    <!-- test: text -->                           output, data or a sketch: neither a command nor Python
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

MARK = re.compile(r"<!-- test: (run|parse|text)((?:, .*)?) -->")
SLOW = ", slow"
REPLACEMENT = re.compile(r', "([^"]*)" for "([^"]+)"')
REASON = re.compile(r", because (\S.*)")
INDENT = "    "
PROGRAMS = ("srun ", "torchrun ", "deepspeed ", "longvideo ")
END_OF_COMMAND = re.compile(r" (?:\d?>|\||&&)")


@dataclass(frozen=True)
class Block:
    """line: its first one. language: of its fence, empty for an indented block. mark: the text line before it."""

    page: str
    line: int
    text: str
    language: str
    mark: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Task:
    """What is done with a block. text: with its replacements."""

    block: Block
    mode: str
    is_slow: bool
    text: str


def read_blocks(page: str, content: str) -> list[Block]:
    """Return the blocks of a page in Markdown."""
    blocks, lines = [], content.split("\n")
    number, mark = 0, ""
    while number < len(lines):
        line, end = lines[number], number
        if line.startswith("```"):
            end = next(other for other in range(number + 1, len(lines)) if lines[other].startswith("```"))
            blocks.append(Block(page, number + 2, "\n".join(lines[number + 1 : end]), line[3:].strip(), mark))
        elif line.startswith(INDENT) and (number == 0 or not lines[number - 1].strip()):
            while end + 1 < len(lines) and (lines[end + 1].startswith(INDENT) or not lines[end + 1].strip()):
                end += 1
            text = "\n".join(part.removeprefix(INDENT) for part in lines[number : end + 1]).rstrip()
            blocks.append(Block(page, number + 1, text, "", mark))
        mark = mark if end == number and not line.strip() else line.strip()
        number = end + 1
    return blocks


def read_task(block: Block) -> Task:
    """Return the task that the mark of a block defines. Raises ValueError for a missing or an unknown mark."""
    match = MARK.fullmatch(block.mark)
    if match is None:
        raise ValueError(f"{block.name}: no mark is in the line before the block; write one as in tests/docs_blocks.py")
    mode, rest = match[1], match[2]
    is_slow = rest.startswith(SLOW)
    text, rest = block.text, rest.removeprefix(SLOW)
    for new, old in REPLACEMENT.findall(rest):
        if old not in text:
            raise ValueError(f"{block.name}: {old!r} of the mark is not in the block")
        text = text.replace(old, new)
    rest = REPLACEMENT.sub("", rest)
    reason = REASON.fullmatch(rest)
    if (rest and not reason) or (mode == "run" and reason) or (is_slow and mode != "run"):
        raise ValueError(f"{block.name}: the mark {block.mark!r} is not understood; see tests/docs_blocks.py")
    if mode == "parse" and block.language != "python" and not reason:
        raise ValueError(f"{block.name}: say after 'because' why the commands are not run")
    return Task(block, mode, is_slow, text)


def read_commands(text: str, language: str = "") -> list[list[str]]:
    """Return the words of each command, variables filled in. `...` stands for the command before, as far as that goes.

    Words in brackets are optional, and taken. Of a script (`bash`) only the commands of PROGRAMS are returned.
    """
    nodes = match[1] if (match := re.search(r"^#SBATCH .*--nodes (\d+)", text, re.MULTILINE)) else "1"
    text = text.replace("\\\n", " ").replace("$SLURM_NNODES", nodes)
    text = re.sub(r"\$\(.*?\)|\$\w+", "VALUE", text)
    if language == "bash":
        lines = (line.strip() for line in text.split("\n"))
        text = "\n".join(END_OF_COMMAND.split(line)[0] for line in lines if line.startswith(PROGRAMS))
    commands: list[list[str]] = []
    for line in text.split("\n"):
        for part in " ".join(_quoted(word) for word in shlex.split(line, comments=True)).split(" && "):
            words = shlex.split(part)
            if words[:1] == ["..."]:
                words = commands[-1] + words[1:]
            if words[-1:] == ["..."]:
                words = words[:-1]
            if words:
                commands.append([word.strip("[]") if _is_optional(word) else word for word in words])
    return commands


def launch(words: list[str]) -> tuple[int, list[str]]:
    """Return on how many ranks a command runs, and the command as it is without a launcher."""
    words = words[1:] if words[0] == "srun" else words
    if words[0] == "torchrun":
        ranks = int(_option(words, "--nproc-per-node")) * int(_option(words, "--nnodes", "1"))
        if "--no-python" in words:
            return ranks, words[words.index("longvideo") :]
        return ranks, _module(words[words.index("-m") + 1 :])
    if words[0] == "deepspeed":
        return 8, _module(words[words.index("--module") + 1 :])
    return 1, words


def python_files(words: list[str]) -> list[Path]:
    """Return the files that a pytest command names."""
    return [Path(word.split("::")[0]) for word in words if word.split("::")[0].endswith(".py")]


def _module(words: list[str]) -> list[str]:
    commands = {"longvideo": [], "longvideo.train": ["train", "ar"], "longvideo.distill": ["distill"]}
    return ["longvideo", *commands[words[0]], *words[1:]]


def _option(words: list[str], name: str, default: str | None = None) -> str:
    if name not in words and default is not None:
        return default
    return words[words.index(name) + 1]


def _is_optional(word: str) -> bool:
    return word.startswith("[--") or (word.endswith("]") and "[" not in word)


def _quoted(word: str) -> str:
    return word if word == "&&" else shlex.quote(word)
