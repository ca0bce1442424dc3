"""`longvideo eval compare`: the difference of evaluations with the same prompts and seeds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longvideo.cli.evaluation_output import HEADINGS
from longvideo.cli.output import OUTPUT
from longvideo.errors import UserError
from longvideo.files import check_target, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from longvideo.evaluation.comparison import ComparedPart, PairedDifference


def compare(
    base: Annotated[
        Path, typer.Argument(metavar="BASE", help="Folder, or results.json, that `eval shapeworld` wrote.")
    ],
    others: Annotated[
        list[Path],
        typer.Argument(metavar="OTHER", help="Results that are compared with BASE, of the same prompts and seeds."),
    ],
    bar: Annotated[
        float | None,
        typer.Option(metavar="POINTS", help="Also print whether OTHER is at most this many points below BASE."),
    ] = None,
    out: Annotated[Path | None, typer.Option(*OUTPUT, help="Also write the numbers to this JSON file.")] = None,
) -> None:
    """Compare results of `eval shapeworld` with the same prompts and seeds, video by video.

    For each question of the judge prints the percent right of BASE and OTHER, the difference in points (OTHER minus
    BASE), and the 95 % interval of the mean difference of a video. "both" is about videos with two objects. Videos of
    more than one window of 4 s are also compared as a whole (a video's share of right windows) and in the last window,
    where a drift would show. For videos of several shots these are every shot, the first and the last one. With --bar,
    "within" is decided by the difference itself, not by its interval.

    Example: `longvideo eval compare runs/eval_bf16 runs/eval_fp8 --bar 3 --output difference.json`
    """
    from rich.console import Console

    from longvideo.evaluation.comparison import compare_results
    from longvideo.evaluation.results_file import read_results

    if bar is not None and not 0 <= bar <= 100:
        raise UserError(f"--bar {bar:g} is not a number of points; use a number from 0 to 100")
    if out is not None:
        check_target(out)
    reference = read_results(base)
    compared = {}
    for other in others:
        # all of them before the first table: an error is at the start
        compared[str(other)] = compare_results(reference, read_results(other))
    for other, parts in compared.items():
        typer.echo(f"{other} against {base}, percent right of {len(reference.videos)} videos")
        Console(width=100).print(difference_table(parts, bar))
    if out is not None:
        comparisons = {other: comparison_record(parts, bar) for other, parts in compared.items()}
        write_json(out, {"base": str(base), "bar": bar, "others": comparisons})


def difference_table(parts: Sequence[ComparedPart], bar: float | None) -> Table:
    """Return a table with one row for each question in each part. bar: points; None omits the last column."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("", "", "base", "other", "difference", "95 % interval", "videos"):
        table.add_column(heading, no_wrap=True, justify="right" if heading else "left")
    if bar is not None:
        table.add_column(f"within {bar:g}", no_wrap=True)
    for part in parts:
        for question, difference in part.differences.items():
            numbers = [f"{difference.base:.1f}", f"{difference.other:.1f}", f"{difference.points:+.2f}"]
            cells = [part.heading, HEADINGS[question], *numbers, interval(difference), str(difference.num_videos)]
            if bar is not None:
                cells.append("yes" if difference.is_within(bar) else "no")
            table.add_row(*cells)
        table.add_section()
    return table


def interval(difference: PairedDifference) -> str:
    """Return the text of an interval; empty for one video."""
    if difference.low is None or difference.high is None:
        return ""
    return f"{signed(difference.low)} to {signed(difference.high)}"


def signed(points: float) -> str:
    """Return a number of points with its sign. Zero has none, also if it is a small negative number."""
    return f"{points:+.1f}" if round(points, 1) else "0.0"


def comparison_record(parts: Sequence[ComparedPart], bar: float | None) -> dict[str, dict[str, object]]:
    """Return the numbers of a comparison for JSON. bar: as in `difference_table`."""
    return {
        part.name: {
            "heading": part.heading,
            "differences": {
                question: difference.record() | ({} if bar is None else {"within": difference.is_within(bar)})
                for question, difference in part.differences.items()
            },
        }
        for part in parts
    }
