"""Results of a comparison of recipes: held-out losses against those of the first recipe, as a table and as curves."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longvideo.evaluation.curves import RunMetrics, draw_curves

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL import Image

LOSS, TRAINING_LOSS = "val_loss", "loss"
QUARTERS = tuple(f"val_mse_{level}" for level in ("0.25", "0.5", "0.75", "1"))


@dataclass(frozen=True)
class RecipeResult:
    """The finished runs of a recipe, by seed.

    losses: last held-out loss of each seed. by_quarter: last held-out error of each quarter of the noise level that has
    frames. reached: first step of a held-out loss that is not above the last one of the first recipe with this seed;
    None if no loss is. seconds: median of the duration of a step.
    """

    name: str
    losses: dict[int, float]
    by_quarter: dict[str, float]
    reached: dict[int, int | None]
    seconds: float

    @property
    def loss(self) -> float:
        return statistics.fmean(self.losses.values())

    @property
    def spread(self) -> float | None:
        """Standard deviation of the loss over seeds; None for a single one."""
        return statistics.stdev(self.losses.values()) if len(self.losses) > 1 else None

    @property
    def steps_to_baseline(self) -> float | None:
        """Mean of `reached`; None unless all seeds reach the loss."""
        steps = [step for step in self.reached.values() if step is not None]
        return statistics.fmean(steps) if len(steps) == len(self.reached) else None


def summarize(runs: Mapping[str, Mapping[int, RunMetrics]]) -> list[RecipeResult]:
    """Return a result for each recipe with finished runs. runs: metrics by recipe and seed; the first is the baseline.

    Without a run of the first recipe with the same seed, `reached` is None.
    """
    baseline = {seed: _last(run, LOSS) for seed, run in next(iter(runs.values())).items()}
    return [_summarize(name, seeds, baseline) for name, seeds in runs.items() if seeds]


def _summarize(name: str, seeds: Mapping[int, RunMetrics], baseline: Mapping[int, float]) -> RecipeResult:
    quarters: dict[str, float] = {}
    for quarter in QUARTERS:
        values = [_last(run, quarter) for run in seeds.values() if run.points(quarter)]
        if values:
            quarters[quarter] = statistics.fmean(values)
    seconds = [value for run in seeds.values() for _, value in run.points("seconds")]
    return RecipeResult(
        name,
        losses={seed: _last(run, LOSS) for seed, run in seeds.items()},
        by_quarter=quarters,
        reached={seed: _first_at(run, baseline.get(seed, -math.inf)) for seed, run in seeds.items()},
        seconds=statistics.median(seconds) if seconds else math.nan,
    )


def _last(run: RunMetrics, name: str) -> float:
    return run.points(name)[-1][1]


def _first_at(run: RunMetrics, loss: float) -> int | None:
    return next((int(step) for step, value in run.points(LOSS) if value <= loss), None)


def recipe_table(results: Sequence[RecipeResult], failures: Mapping[str, str], *, baseline: str) -> str:
    """Return a table in Markdown with a row for each recipe, and then the failed runs.

    baseline: name of the recipe that gaps are measured against; without a result of it they are empty.
    """
    heads = ["recipe", "held-out loss", "gap", "excess", *(f"noise up to {q[8:]}" for q in QUARTERS)]
    heads += [f"steps to the loss of {baseline}", "seconds a step"]
    lines = [_row(heads), _row(["---"] * len(heads))]
    first = _named(results, baseline)
    compared = {} if first is None else first.by_quarter
    for result in results:
        spread = "" if result.spread is None else f" ± {result.spread:.4f}"
        quarters = [_gap(result.by_quarter.get(q), compared.get(q)) for q in QUARTERS]
        steps = result.steps_to_baseline
        lines.append(
            _row(
                [
                    result.name,
                    f"{result.loss:.4f}{spread}",
                    _gap(result.loss, None if first is None else first.loss),
                    "" if first is None else f"{result.loss - first.loss:+.4f}",
                    *quarters,
                    "" if steps is None else f"{steps:.0f}",
                    f"{result.seconds:.3f}",
                ]
            )
        )
    lines += [f"\nfailed: {label}: {reason}" for label, reason in failures.items()]
    return "\n".join(lines)


def results_record(results: Sequence[RecipeResult], failures: Mapping[str, str], *, baseline: str) -> dict[str, Any]:
    """Return the results for JSON. baseline: as of `recipe_table`; without a result of it gaps are null."""
    first = _named(results, baseline)
    return {
        "recipes": [
            {
                "name": result.name,
                "losses": {str(seed): loss for seed, loss in result.losses.items()},
                "loss": result.loss,
                "spread": result.spread,
                "gap_percent": None if first is None else 100 * (result.loss / first.loss - 1),
                "excess": None if first is None else result.loss - first.loss,
                "by_quarter": result.by_quarter,
                "excess_by_quarter": {
                    quarter: value - first.by_quarter[quarter]
                    for quarter, value in result.by_quarter.items()
                    if first is not None and quarter in first.by_quarter
                },
                "steps_to_baseline": result.steps_to_baseline,
                "seconds": result.seconds,
            }
            for result in results
        ],
        "baseline": baseline,
        "failures": dict(failures),
    }


def draw_losses(runs: Mapping[str, Mapping[int, RunMetrics]]) -> Image.Image:
    """Draw the training loss of each recipe over the steps, the mean of its seeds."""
    curves = [RunMetrics(name, _mean_lines(list(seeds.values()))) for name, seeds in runs.items() if seeds]
    return draw_curves(curves, [TRAINING_LOSS], title="training loss")


def _mean_lines(runs: Sequence[RunMetrics]) -> tuple[dict[str, float], ...]:
    values: dict[float, list[float]] = {}
    for run in runs:
        for step, loss in run.points(TRAINING_LOSS):
            values.setdefault(step, []).append(loss)
    return tuple({"step": step, TRAINING_LOSS: statistics.fmean(losses)} for step, losses in sorted(values.items()))


def _named(results: Sequence[RecipeResult], name: str) -> RecipeResult | None:
    return next((result for result in results if result.name == name), None)


def _gap(value: float | None, first: float | None) -> str:
    return "" if value is None or not first else f"{value / first - 1:+.1%}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
