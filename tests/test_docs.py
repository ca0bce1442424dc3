"""Run or parse every command and every piece of Python in the documentation, as its mark defines."""

from __future__ import annotations

import ast
import re
import subprocess
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from longvideo.cli.main import app, main
from longvideo.distributed import Mesh, ParallelConfig, check_sequence, divide
from longvideo.errors import UserError
from longvideo.model.config import PRESETS
from longvideo.train.clips.recipe import ClipTraining
from longvideo.train.vae.recipe import VaeTraining
from tests.docs_blocks import Block, Task, launch, python_files, read_blocks, read_commands, read_task
from tests.options import OPTIONS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [block for page in PAGES for block in read_blocks(str(page.relative_to(ROOT)), page.read_text())]
# programs that are not this project's, whose own options are not checked
OTHERS = frozenset({"git", "cd", "python3", "pre-commit", "source", "hf", "ssh"})


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
    """A folder that the blocks of all pages share: a later one may use what an earlier one made."""
    return tmp_path_factory.mktemp("docs")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_every_block_has_a_mark(block: Block) -> None:
    read_task(block)


@pytest.mark.parametrize("task", marked("run"))
@pytest.mark.filterwarnings("ignore:the model never learned")
def test_what_is_marked_so_runs(task: Task, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    run(task)


@pytest.mark.slow
@pytest.mark.parametrize("task", marked("run", slow=True))
@pytest.mark.filterwarnings("ignore:the model never learned")
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


def check_command(ranks: int, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = Path(words[0]).name, *words[1:]
    if program == "longvideo" and arguments[0] in ("train", "distill"):
        check_training(ranks, arguments, monkeypatch)
    elif program == "longvideo":
        parse(arguments)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(targets)
    elif program == "pytest":
        assert python_files(arguments) and all((ROOT / file).is_file() for file in python_files(arguments))
        assert {word for word in arguments if word.startswith("--")} <= {option.name for option in OPTIONS}
    elif program == "pip":
        named = re.findall(r"\[([\w,]+)\]", " ".join(arguments))
        known = metadata("longvideo").get_all("Provides-Extra") or []
        assert {name for names in named for name in names.split(",")} <= set(known)
    else:
        assert program in OTHERS, f"{program} is not known here"


def parse(arguments: list[str]) -> None:
    """Read the options of a command as it does itself. Raises typer.TyperException for an unknown one."""
    command: Any = get_command(app)
    while arguments and hasattr(command, "get_command") and not arguments[0].startswith("-"):
        name, *arguments = arguments
        command = command.get_command(command.make_context(command.name, [], resilient_parsing=True), name)
        assert command is not None, f"there is no command {name}"
    try:
        command.make_context(command.name, list(arguments))
    except typer.Exit as end:  # after --help or --version
        assert end.exit_code == 0


def check_training(ranks: int, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a training command until it would begin, and check whether its ranks can share the work."""
    configs = []
    monkeypatch.setattr("longvideo.training.run.run", lambda config, *_, **__: configs.append(config))
    assert main(arguments) == 0
    (config,) = configs
    parallel = getattr(config, "parallel", ParallelConfig())
    assert ranks % parallel.sequence == 0 and not (isinstance(config, VaeTraining) and ranks > 1)
    if isinstance(config, ClipTraining):
        heads = PRESETS[config.preset].num_attention_heads
        check_sequence(parallel.sequence, heads=heads, chunk_counts=[stage.chunks for stage in config.stages])
    for stage in config.stages:
        divide(stage.batch, Mesh(ranks, 0, parallel.sequence), parallel.micro_batch)


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
        '<!-- test: run, "a" for "not there" -->',
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
