"""`longvideo bench recipes`: trainings that differ in a few settings, compared at equal seeds, data and steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longvideo.cli.config import SCHEMAS
from longvideo.cli.output import OUTPUT
from longvideo.cli.training import Arguments, Device
from longvideo.errors import ConfigError
from longvideo.files import read_json, write_json, write_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longvideo.train.comparison.runs import ComparedRecipe, RecipeRun

RECIPES_FILE, RESULTS_FILE, TABLE_FILE, CURVES_FILE = "recipes.json", "results.json", "table.md", "curves.png"


def recipes(
    arguments: Arguments = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:KEY=VALUE ...",
            help="A recipe: a name, and settings with spaces between them, which may be none. Or a YAML file that maps"
            " names to lists of settings. Repeat the option; the first recipe is what the others are compared with.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds of each recipe, from the configuration's on.")] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="Number of runs at a time, on one device.")] = 1,
    device: Device = None,
    out: Annotated[Path, typer.Option(*OUTPUT, help="Folder for the runs and their comparison.")] = Path(
        "runs/recipes"
    ),
) -> None:
    """Train recipes at equal seeds, data and steps, and compare their losses on held-out data.

    The configuration is one of `train ar` or of `train clips`, with held-out data (`validation.batches=8`, or
    `validation.data`). Each run is a `longvideo train` in a process and folder of its own. The same command resumes
    runs that were stopped, and does not repeat finished ones.

    Writes `table.md` and `results.json` with the loss that each run has with its own products, its gap to the first
    recipe, the gap by quarters of the noise level, the steps to the loss of the first recipe as far as
    `trainer.sample_every` shows it, and the time of a step, and `curves.png`.

    Example: `longvideo bench recipes tiny/ar_opening validation.batches=8 --vary "bf16:" --vary
    "best:products.format=nvfp4" --seeds 3 --jobs 2`
    """
    from longvideo.evaluation.curves import read_metrics
    from longvideo.evaluation.sheet import write_picture
    from longvideo.train.comparison.results import draw_losses, recipe_table, results_record, summarize
    from longvideo.train.comparison.runs import read_recipes, run_all
    from longvideo.training.run_log import METRICS_FILE

    compared = read_recipes(vary or [])
    runs = _plan(list(arguments or ()), compared, num_seeds=seeds, device=device, out=out)
    _claim(out, list(arguments or ()), compared)
    failures: dict[str, str] = {}
    for run, reason in run_all(runs, jobs=jobs):
        typer.echo(f"{run.label}: {'finished' if reason is None else reason}")
        if reason is not None:
            failures[run.label] = f"{reason}; see {run.log}"
    metrics = {
        recipe.name: {
            run.seed: read_metrics(run.folder / METRICS_FILE)
            for run in runs
            if run.recipe == recipe.name and run.label not in failures
        }
        for recipe in compared
    }
    results = summarize(metrics)
    baseline = compared[0].name
    table = recipe_table(results, failures, baseline=baseline)
    write_text(out / TABLE_FILE, table + "\n")
    write_json(out / RESULTS_FILE, results_record(results, failures, baseline=baseline))
    if results:
        write_picture(draw_losses(metrics), out / CURVES_FILE)
    typer.echo(table)
    if failures:
        raise typer.Exit(1)


def _plan(
    arguments: list[str], compared: Sequence[ComparedRecipe], *, num_seeds: int, device: str | None, out: Path
) -> list[RecipeRun]:
    """Return all runs, seed by seed. Raises ConfigError where one has no held-out loss, or other steps."""
    from longvideo.config.loading import find_config, load_config, sets_key
    from longvideo.train.comparison.runs import RecipeRun, train_words

    files = [find_config(word) for word in arguments if "=" not in word]
    if not files:
        raise ConfigError("no configuration to train; name a preset or a YAML file, such as tiny/ar_opening")
    overrides = [word for word in arguments if "=" in word]
    is_clips = sets_key("data", files, overrides)
    schema = SCHEMAS["train clips" if is_clips else "train ar"]()
    configs: list[Any] = [load_config(schema, files, [*overrides, *recipe.settings]) for recipe in compared]
    steps = [sum(stage.steps for stage in config.stages) for config in configs]
    for recipe, config, total in zip(compared, configs, steps, strict=True):
        if not config.validation.batches or (is_clips and config.validation.data is None):
            remedy = "validation.data=CLIPS" if is_clips else "validation.batches=8"
            raise ConfigError(
                f"{recipe.name} computes no loss on held-out data, which recipes are compared by; add {remedy}"
            )
        if total != steps[0]:
            raise ConfigError(
                f"{recipe.name} has {total} steps, and {compared[0].name} has {steps[0]}; use equal steps"
            )
    runs: list[RecipeRun] = []
    for number in range(num_seeds):
        for recipe, config, total in zip(compared, configs, steps, strict=True):
            seed, folder = config.seed + number, out / recipe.name / f"seed_{config.seed + number}"
            words = [*arguments, *recipe.settings, f"seed={seed}"]
            command = train_words("clips" if is_clips else "ar", words, folder, device=device)
            runs.append(RecipeRun(recipe.name, seed, folder, command, total))
    return runs


def _claim(out: Path, arguments: list[str], compared: Sequence[ComparedRecipe]) -> None:
    """Note what the folder compares. Raises ConfigError for a folder with runs of other settings."""
    file, recipes = out / RECIPES_FILE, {recipe.name: list(recipe.settings) for recipe in compared}
    if file.exists():
        before = read_json(file)
        known = before.get("recipes")
        assert isinstance(known, dict)
        if before.get("arguments") != arguments:
            raise ConfigError(f"{out} compares {before.get('arguments')}, not {arguments}; use another --output")
        for name, settings in recipes.items():
            if known.get(name, settings) != settings:
                raise ConfigError(
                    f"{out} has runs of {name!r} with {known[name]}, not {settings}; use another name or --output"
                )
        recipes = {**known, **recipes}
    out.mkdir(parents=True, exist_ok=True)
    write_json(file, {"arguments": arguments, "recipes": recipes})
