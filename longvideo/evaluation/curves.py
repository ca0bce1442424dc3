"""Draw curves of training runs from their metrics.jsonl files."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from longvideo.errors import UserError
from longvideo.evaluation.sheet import plot_curves
from longvideo.files import parse_json, read_lines

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from PIL import Image

MAX_BYTES = 512 * 2**20
LARGEST = 1e300
NUM_INTERVALS = 5
"""Number of intervals into which `plot_curves` divides the y axis."""


@dataclass(frozen=True)
class RunMetrics:
    """The contents of one metrics.jsonl.

    run: name of the run folder. lines: in order; each has `step` and some of the run's metrics.
    """

    run: str
    lines: tuple[dict[str, float], ...]

    @property
    def last_step(self) -> float:
        """Largest step of all lines."""
        return max(line["step"] for line in self.lines)

    def names(self) -> list[str]:
        """Return the names of all metrics, in the order of their first appearance."""
        return list(dict.fromkeys(name for line in self.lines for name in line if name != "step"))

    def points(self, name: str) -> list[tuple[float, float]]:
        """Return (step, value) for each line with the metric `name`."""
        return [(line["step"], line[name]) for line in self.lines if name in line]


def read_metrics(path: Path) -> RunMetrics:
    """Read the metrics.jsonl of a run. Raises UserError, with the file and the line, for another file."""
    texts = enumerate(read_lines(path, what="metrics.jsonl of a run", max_bytes=MAX_BYTES), 1)
    lines = [_read_line(line, f"{path}:{number}") for number, line in texts if line.strip()]
    if not lines:
        raise UserError(f"{path} has no lines yet; a run writes one every trainer.log_every steps")
    return RunMetrics(path.resolve().parent.name, tuple(lines))


def draw_curves(
    runs: Sequence[RunMetrics],
    names: Sequence[str],
    *,
    title: str,
    join: bool = False,
    y_range: tuple[float | None, float | None] = (None, None),
) -> Image.Image:
    """Draw metrics of runs over the steps. Raises UserError for a metric that is in no run.

    join: draw the runs one after another, for runs that each resume from the previous one. y_range: ends of the y axis;
    None uses a round number that includes all values. Values outside of the range are drawn at its border.
    """
    check_names(runs, names)
    series: dict[str, list[tuple[float, float]]] = {}
    offset = 0.0
    for run in runs:
        for name in names:
            label = name if join or len(runs) == 1 else f"{run.run} {name}"
            points = [(step + offset, value) for step, value in run.points(name)]
            if points:
                series.setdefault(label, []).extend(points)
        offset += run.last_step if join else 0.0
    steps = sorted({step for points in series.values() for step, _ in points})
    values = [value for points in series.values() for _, value in points if math.isfinite(value)]
    if not values:
        raise UserError(f"no value of {', '.join(names)} is finite; use another --metric")
    low, high = round_range(min(values), max(values))
    return plot_curves(
        {label: fill_gaps(points, steps) for label, points in series.items()},
        steps,
        title=title,
        x_label="steps",
        y_range=(low if y_range[0] is None else y_range[0], high if y_range[1] is None else y_range[1]),
        percent=False,
    )


def check_names(runs: Sequence[RunMetrics], names: Sequence[str]) -> None:
    """Raise UserError unless every metric is in at least one run."""
    known = list(dict.fromkeys(name for run in runs for name in run.names()))
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1, 0.5)
            remedy = f"did you mean {nearest[0]!r}?" if nearest else f"use one of {', '.join(known)}"
            raise UserError(f"no run has the metric {name!r}; {remedy}")


def fill_gaps(points: Sequence[tuple[float, float]], steps: Sequence[float]) -> list[float]:
    """Return a value at each of `steps`, interpolated linearly; NaN before the first and after the last point."""
    at, values = zip(*points, strict=True)
    return np.interp(steps, at, values, left=math.nan, right=math.nan).tolist()


def round_range(low: float, high: float) -> tuple[float, float]:
    """Return bounds that include [low, high] with NUM_INTERVALS intervals of 1, 2, 2.5 or 5 times a power of ten."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / NUM_INTERVALS))
    for factor in (1, 2, 2.5, 5, 10, 20):
        step = factor * power
        bottom = math.floor(low / step) * step
        if bottom + NUM_INTERVALS * step >= high:
            return bottom, bottom + NUM_INTERVALS * step
    raise AssertionError("an interval of twenty times the power of ten is always large enough")


def _read_line(line: str, where: str) -> dict[str, float]:
    values = parse_json(line, where=where)
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        raise UserError(f"{where} has no step; use the metrics.jsonl of a run folder")
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not abs(value) > LARGEST
    }
