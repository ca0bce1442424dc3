"""Recipes of a comparison are read from words and files, and their runs report how they ended."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from longvideo.errors import ConfigError
from longvideo.files import write_json
from longvideo.train.comparison.runs import ComparedRecipe, RecipeRun, read_recipes, run_all


def test_recipes_are_read_from_words_and_from_files(tmp_path: Path) -> None:
    file = tmp_path / "more.yaml"
    file.write_text("nearest: [products.format=nvfp4, products.parts.gradients=nearest]\nplain:\n")
    words = ["bf16:", 'kept:products.format=nvfp4 \'products.keep=["*.ffn.*", "blocks.0.*"]\'', str(file)]
    assert read_recipes(words) == [
        ComparedRecipe("bf16", ()),
        ComparedRecipe("kept", ("products.format=nvfp4", 'products.keep=["*.ffn.*", "blocks.0.*"]')),
        ComparedRecipe("nearest", ("products.format=nvfp4", "products.parts.gradients=nearest")),
        ComparedRecipe("plain", ()),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bf16:"], "a comparison needs at least two recipes"),
        (["a:", "a:products.format=fp8"], "two recipes named 'a'"),
        (["a:", "products.format=fp8"], "'products.format=fp8' has no name; write NAME:KEY=VALUE"),
        (["a:", "b:fp8"], "--vary b: 'fp8' is not a setting; write key=value"),
        (["a:", "b:seed=3"], "all recipes have the same seeds; use --seeds"),
        (["a:", "../b:"], "'../b' is not a name of a folder"),
    ],
)
def test_words_of_another_form_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_recipes(words)


def run(folder: Path, name: str, code: str) -> RecipeRun:
    return RecipeRun(name, 0, folder / name / "seed_0", (sys.executable, "-c", code), total_steps=4)


def test_a_failed_run_names_its_error_and_a_finished_one_does_not_run(tmp_path: Path) -> None:
    wrong = run(tmp_path, "wrong", "print('begun'); import sys; sys.exit('error: seed is -1')")
    silent = run(tmp_path, "silent", "import sys; sys.exit(3)")
    good, finished = run(tmp_path, "good", "print('done')"), run(tmp_path, "finished", "raise SystemExit(1)")
    finished.folder.mkdir(parents=True)
    write_json(finished.folder / "exported.json", {"step": 4})
    stopped = run(tmp_path, "stopped", "print('resumed')")
    stopped.folder.mkdir(parents=True)
    write_json(stopped.folder / "exported.json", {"step": 2})
    ends = {own.recipe: reason for own, reason in run_all([wrong, silent, good, finished, stopped], jobs=2)}
    assert ends == {
        "wrong": "ended with code 1: error: seed is -1",
        "silent": "ended with code 3: it printed nothing",
        "good": None,
        "finished": None,
        "stopped": None,
    }
    assert good.log.read_text() == "done\n" and stopped.log.read_text() == "resumed\n" and not finished.log.exists()
