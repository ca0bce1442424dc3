"""Runs of a comparison of recipes: each is a training of its own in a process of its own, and is resumed if stopped."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from longvideo.config.yaml_reader import read_yaml
from longvideo.errors import ConfigError
from longvideo.files import read_json
from longvideo.training.run_folder import EXPORTED_FILE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FILES = (".yaml", ".yml")
MOST_READ = 1 << 16
"""Number of bytes of a log that are searched for the error of a run."""


@dataclass(frozen=True)
class ComparedRecipe:
    """A name and the settings, `key=value`, that make it differ from the others of a comparison."""

    name: str
    settings: tuple[str, ...]


def read_recipes(words: Sequence[str]) -> list[ComparedRecipe]:
    """Read recipes from words such as `nvidia:products.format=nvfp4 products.recipe=nvidia`, and from YAML files.

    A file maps names to lists of settings. Raises ConfigError for a word without a name or settings of another form,
    for two recipes of one name, and for a seed, which is that of the comparison.
    """
    recipes: list[ComparedRecipe] = []
    for word in words:
        recipes += _read_file(word) if word.endswith(FILES) else [_read_word(word)]
    names = [recipe.name for recipe in recipes]
    for recipe in recipes:
        if names.count(recipe.name) > 1:
            raise ConfigError(f"--vary has two recipes named {recipe.name!r}; give each a name of its own")
        if not recipe.name or "/" in recipe.name or recipe.name.startswith("."):
            raise ConfigError(f"--vary: {recipe.name!r} is not a name of a folder; use letters, digits and -")
        for setting in recipe.settings:
            if "=" not in setting:
                raise ConfigError(f"--vary {recipe.name}: {setting!r} is not a setting; write key=value")
            if setting.partition("=")[0] == "seed":
                raise ConfigError(f"--vary {recipe.name}: all recipes have the same seeds; use --seeds and seed=")
    if len(recipes) < 2:
        raise ConfigError("a comparison needs at least two recipes; add --vary 'NAME:KEY=VALUE ...', or a YAML file")
    return recipes


@dataclass(frozen=True)
class RecipeRun:
    """A training: one recipe with one seed.

    command: words that start it. total_steps: number of steps after which it is finished.
    """

    recipe: str
    seed: int
    folder: Path
    command: tuple[str, ...]
    total_steps: int

    @property
    def label(self) -> str:
        return f"{self.recipe}, seed {self.seed}"

    @property
    def log(self) -> Path:
        """File with what the run prints."""
        return self.folder.with_suffix(".log")

    def is_finished(self) -> bool:
        exported = self.folder / EXPORTED_FILE
        return exported.exists() and read_json(exported).get("step") == self.total_steps

    def start(self) -> str | None:
        """Train, unless the run is finished; return the reason if it fails."""
        if self.is_finished():
            return None
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w", encoding="utf-8") as log:
            code = subprocess.run(self.command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        if code == 0:
            return None
        lines = [line for line in self._last_words().splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")] or lines or ["it printed nothing"]
        return f"ended with code {code}: {errors[-1]}"

    def _last_words(self) -> str:
        """Return the end of what the run printed, which may be long and need not be text."""
        with self.log.open("rb") as log:
            log.seek(-min(MOST_READ, self.log.stat().st_size), os.SEEK_END)
            return log.read().decode(errors="replace")


def train_words(kind: str, arguments: Sequence[str], folder: Path, *, device: str | None) -> tuple[str, ...]:
    """Return the words that start a training. kind: `ar` or `clips`. arguments: configurations and settings."""
    more = () if device is None else ("--device", device)
    return (sys.executable, "-m", "longvideo", "train", kind, *arguments, "--output", str(folder), *more)


def run_all(runs: Sequence[RecipeRun], *, jobs: int) -> Iterator[tuple[RecipeRun, str | None]]:
    """Train all runs, `jobs` at a time; yield each when it ends, with the reason if it failed."""
    with ThreadPoolExecutor(jobs) as pool:
        ends = {pool.submit(run.start): run for run in runs}
        for end in as_completed(ends):
            yield ends[end], end.result()


def _read_word(word: str) -> ComparedRecipe:
    name, colon, settings = word.partition(":")
    if not colon:
        raise ConfigError(f"--vary {word!r} has no name; write NAME:KEY=VALUE, with more settings after spaces")
    return ComparedRecipe(name.strip(), tuple(shlex.split(settings)))


def _read_file(word: str) -> list[ComparedRecipe]:
    values = read_yaml(Path(word), what="recipes to compare").value
    if not isinstance(values, dict):
        raise ConfigError(f"{word} holds no mapping; expected lines such as `nvidia: [products.recipe=nvidia]`")
    recipes: list[ComparedRecipe] = []
    for name, settings in values.items():
        items = [] if settings is None else settings
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise ConfigError(f"{word}: {name} is {settings!r}; expected a list of settings such as [seed=3]")
        recipes.append(ComparedRecipe(str(name), tuple(items)))
    return recipes
