"""Run or parse every command and every piece of Python in the documentation, as its mark defines."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer

from longvideo.cli.main import main
from longvideo.errors import UserError
from tests.docs_blocks import Block, Task, launch, read_blocks, read_commands, read_task
from tests.docs_commands import check_command

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [block for page in PAGES for block in read_blocks(str(page.relative_to(ROOT)), page.read_text())]


def marked(mode: str, *, slow: bool = False) -> list[Any]:
    tasks = []
    for block in BLOCKS:
        try:
            task = read_task(block)
        except ValueError:
            continue  # test_every_block_has_a_mark fails for it
        if task.mode == mode and task.is_slow == slow:
            tasks.append(pytest.param(task, id=block.name))
    return tasks


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that the blocks of all pages share: a later one may use the files of an earlier one."""
    return tmp_path_factory.mktemp("docs")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_every_block_has_a_mark(block: Block) -> None:
    read_task(block)


@pytest.mark.parametrize("task", marked("run"))
@pytest.mark.filterwarnings("ignore:the model's vocabulary does not contain")
def test_what_is_marked_so_runs(task: Task, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    run(task)


@pytest.mark.slow
@pytest.mark.parametrize("task", marked("run", slow=True))
@pytest.mark.filterwarnings("ignore:the model's vocabulary does not contain")
def test_what_is_marked_so_runs_slowly(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(task)


@pytest.mark.parametrize("task", [*marked("parse"), *marked("run"), *marked("run", slow=True)])
def test_what_is_shown_exists(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    if task.block.language == "python":
        check_imports(task.text)
        return
    if task.block.language == "bash":
        subprocess.run(["bash", "-n"], input=task.block.text, text=True, check=True)
    commands = read_commands(task.block.text, task.block.language)  # as shown, and not as the tests run it
    assert commands
    for words in commands:
        check_command(*launch(words), monkeypatch)


def run(task: Task) -> None:
    if task.block.language == "python":
        exec(compile(task.text, task.block.name, "exec"), {"__name__": "__main__"})
        return
    for words in read_commands(task.text):
        ranks, words = launch(words)
        assert ranks == 1 and Path(words[0]).name == "longvideo", f"{words[0]} is not run here; mark the block as parse"
        assert main(words[1:]) == 0


def check_imports(text: str) -> None:
    nodes = ast.walk(ast.parse(text))
    statements: list[ast.stmt] = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(statements, []), "imports", "exec"), {})


PAGE = """
Text.

<!-- test: run, "--seconds 1" for "--seconds 60" -->

    longvideo generate "a b" --seconds 60  # so long
    longvideo info \\
        tiny

<!-- test: parse -->
```python
import torch
```

<!-- test: run -->

Text between the mark and the block.

    make demo
<!-- test: sing -->
    no block: a line of the paragraph
"""


def test_blocks_have_the_mark_in_the_line_before_them() -> None:
    first, second, third = read_blocks("page.md", PAGE)
    assert (first.line, first.language, second.line, second.language) == (6, "", 12, "python")
    task = read_task(first)
    assert (task.mode, task.is_slow) == ("run", False)
    generate, info = read_commands(task.text)
    assert (generate, info) == (["longvideo", "generate", "a b", "--seconds", "1"], ["longvideo", "info", "tiny"])
    assert read_task(second).text == "import torch"
    with pytest.raises(ValueError, match=r"page.md:19: no mark"):
        read_task(third)


@pytest.mark.parametrize(
    "mark",
    [
        "",
        "<!-- test: sing -->",
        "<!-- test: run, quickly -->",
        "<!-- test: parse -->",
        "<!-- test: parse, slow, because of it -->",
        "<!-- test: run, because of it -->",
        '<!-- test: run, "a" for "missing" -->',
        "<!-- test:run -->",
    ],
)
def test_a_mark_that_is_missing_or_unknown_is_an_error(mark: str) -> None:
    with pytest.raises(ValueError, match="page.md:3"):
        read_task(Block("page.md", 3, "longvideo info tiny", "", mark))


@pytest.mark.parametrize(
    "command",
    [
        "longvideo sing",
        "longvideo data sing",
        "longvideo generate a --second 3",
        "longvideo generate a --seconds many",
        "longvideo train ar tiny/ar stages[0].step=3",
        "longvideo train ar tiny/nothing",
        "torchrun --nproc-per-node 2 -m longvideo train clips wan/ar parallel.sequence=8",
        "torchrun --nproc-per-node 8 -m longvideo train clips wan/ar parallel.sequence=8",
        "torchrun --nproc-per-node 3 -m longvideo.train wan/ar",
        "make tea",
        "pytest tests/test_nothing.py",
        "pytest --quickly 3 tests/test_docs.py",
        'pip install "longvideo[everything]"',
        "frobnicate",
    ],
)
def test_a_command_that_cannot_work_is_found(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, UserError, typer.TyperException)):
        check_command(*launch(read_commands(command)[0]), monkeypatch)


def test_commands_of_launchers_run_on_their_ranks() -> None:
    text = """
#SBATCH --nodes 4
srun torchrun --nnodes $SLURM_NNODES --nproc-per-node 8 --rdzv-endpoint $(hosts | head -n 1):29500 \\
    -m longvideo train clips wan/ar data=clips
... seed=3
torchrun --no-python --nproc-per-node 2 longvideo bench parallel ...
"""
    assert [launch(words) for words in read_commands(text)] == [
        (32, ["longvideo", "train", "clips", "wan/ar", "data=clips"]),
        (32, ["longvideo", "train", "clips", "wan/ar", "data=clips", "seed=3"]),
        (2, ["longvideo", "bench", "parallel"]),
    ]
