"""Output of `longvideo eval`: targets checked before the work, progress bars, and tables of scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longvideo.errors import UserError
from longvideo.files import check_target

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

    from longvideo.evaluation.shapeworld import EvaluationReport, Score

HEADINGS = {
    "count": "number",
    "color": "color",
    "shape": "shape",
    "size": "size",
    "motion": "motion",
    "background": "background",
    "both": "both",
    "shows_prompt": "shown",
    "cut_in_time": "cut",
    "continues": "continues",
}
"""Column headings of scores, in the order of the columns."""


def check_results_folder(folder: Path, *, overwrite: bool) -> None:
    """Raise UserError unless results.json can be written to a folder, which may be missing."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file; use a folder")
    results = folder / "results.json"
    if results.exists() and not overwrite:
        raise UserError(f"--output {folder} already contains results.json; choose another name or add --overwrite")
    check_target_below(results, overwrite=overwrite)


def check_target_below(target: Path, *, overwrite: bool) -> None:
    """Raise WriteError for a file that cannot be written. A missing folder is accepted: it is created later."""
    if target.parent.exists():
        check_target(target, overwrite=overwrite)


def score_table(corner: str, rows: Mapping[str, Mapping[str, Score]], names: Sequence[str] | None = None) -> Table:
    """Return a table of shares in percent, one row for each set of scores.

    corner: heading of the first column. names: scores to show, in this order; by default those of HEADINGS that occur.
    """
    from rich import box
    from rich.table import Table

    if names is None:
        names = [name for name in HEADINGS if any(name in scores for scores in rows.values())]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in (corner, *(HEADINGS.get(name, name) for name in names)):
        table.add_column(heading, no_wrap=True)
    for row, scores in rows.items():
        cells = (f"{scores[name].share:.1%}" if name in scores else "" for name in names)
        table.add_row(row, *cells)
    return table


def print_report(report: EvaluationReport, folder: Path, console: Console) -> None:
    """Print the scores of an evaluation, how they change over time, and the files in its folder."""
    rows = {"first 4 s": report.opening}
    if report.shots:
        rows["every shot"] = report.shots
    console.print(score_table("", rows))
    if len(report.curves["color"]) > 1:
        last = len(report.curves["color"])
        for name in ("color", "shape"):
            curve = report.curves[name]
            middle = f", {curve[19]:.0%} at 20 s" if last > 20 else ""
            console.print(f"{name}: {curve[0]:.0%} in the first second{middle}, {curve[-1]:.0%} in second {last}")
    console.print(f"written: {', '.join(str(path) for path in sorted(folder.iterdir()))}", soft_wrap=True)
