"""Read the records of a manifest from JSON Lines, from a JSON array, or from a table (CSV, or TSV with tabs).

A table has a row for each shot; consecutive rows with the same video and sample are the shots of one record.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longvideo.errors import UserError
from longvideo.files import parse_json, read_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MAX_BYTES = 512 * 2**20
SEPARATORS = {".csv": ",", ".tsv": "\t"}
VIDEO_COLUMNS = ("video", "fps", "num_frames", "sample")
SHOT_COLUMNS = ("start", "end", "start_seconds", "end_seconds", "caption")
TEXT_COLUMNS = ("video", "sample", "caption")
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?")
MAX_DIGITS = 40


@dataclass(frozen=True)
class Record:
    """line: number of its first line, from 1. data: parsed value. problem: why it cannot be parsed; None if it can."""

    line: int
    data: Any
    problem: str | None = None


def read_records(path: Path) -> Iterator[Record]:
    """Read a manifest by the suffix of its name (.csv, .tsv) and its first character. Blank lines are skipped.

    Raises UserError if the file cannot be read or has no record, and if an array or a table is not valid as a whole.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; use the manifest file, such as {path / 'manifest.jsonl'}")
    if not path.exists():
        raise UserError(f"there is no manifest {path}; write one, or use `longvideo data shapeworld`")
    text = read_text(path, what="manifest", max_bytes=MAX_BYTES)
    separator = SEPARATORS.get(path.suffix.lower())
    if separator is not None:
        records = _Table(path, text, separator).records()
    else:
        records = _of_array(text, path) if text.lstrip()[:1] == "[" else _of_lines(text)
    first = next(records, None)
    if first is None:
        raise UserError(f"{path} lists no video; expected one JSON object for each line")
    yield first
    yield from records


def _of_lines(text: str) -> Iterator[Record]:
    # split only at line feeds, because captions may contain other line separators
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield Record(number, parse_json(line.removesuffix("\r"), where="the line"))
            except UserError as error:
                yield Record(number, None, str(error))


def _of_array(text: str, path: Path) -> Iterator[Record]:
    parse_json(text, where=str(path))  # so that the parts are valid too
    decoder = json.JSONDecoder()
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        while text[position] in " \t\r\n,":
            position += 1
        if text[position] == "]":
            return
        line += text.count("\n", counted, position)
        counted = position
        data, position = decoder.raw_decode(text, position)
        yield Record(line, data)


@dataclass(frozen=True)
class _Table:
    """A table of shots. path: its file, for errors."""

    path: Path
    text: str
    separator: str

    def records(self) -> Iterator[Record]:
        rows = self._rows()
        _, columns = next(rows, (1, []))
        columns = [column.strip() for column in columns]
        self._check(columns)
        cells = ((line, _cells(columns, row), len(row)) for line, row in rows)
        for _, group in groupby(cells, key=lambda row: (row[1].get("video"), row[1].get("sample"))):
            members = list(group)
            line, first, _ = members[0]
            problem = None
            for number, values, count in members:
                if count != len(columns):
                    problem = (
                        f"the row at line {number} has {count} cells, expected {len(columns)} as in the first line"
                    )
                elif any(values.get(name) != first.get(name) for name in VIDEO_COLUMNS):
                    problem = f"the row at line {number} has another fps or num_frames than the row of the same video"
            shots = [{name: row[name] for name in SHOT_COLUMNS if name in row} for _, row, _ in members]
            data = {name: first[name] for name in VIDEO_COLUMNS if name in first} | {"shots": shots}
            yield Record(line, data, problem)

    def _check(self, columns: Sequence[str]) -> None:
        """Raise UserError for columns that are unknown, repeated or missing."""
        known = (*VIDEO_COLUMNS, *SHOT_COLUMNS)
        for column in columns:
            if column not in known or columns.count(column) > 1:
                nearest = difflib.get_close_matches(column, known, 1, 0.5)
                remedy = f"did you mean {nearest[0]!r}?" if nearest else f"expected {', '.join(known)}, once each"
                raise UserError(f"{self.path}:1: unknown column {column!r}; {remedy}")
        if columns and not {"video", "caption"} <= set(columns):
            raise UserError(f"{self.path}:1: the columns are {', '.join(columns)}, expected at least video and caption")

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the rows that are not blank with the number of their first line."""
        reader = csv.reader(io.StringIO(self.text, newline=""), delimiter=self.separator, strict=True)
        line = 1
        try:
            for row in reader:
                if any(cell.strip() for cell in row):
                    yield line, row
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{self.path}:{line} is not a row of a table: {error}") from error


def _cells(columns: Sequence[str], row: Sequence[str]) -> dict[str, Any]:
    """Return the cells that are not empty; numbers are parsed, except in columns of text."""
    values = {name: cell for name, cell in zip(columns, row, strict=False) if cell.strip()}
    return {name: cell if name in TEXT_COLUMNS else _number(cell.strip()) for name, cell in values.items()}


def _number(cell: str) -> Any:
    """Return a number, or the text of a cell that is not one."""
    return float(cell) if len(cell) <= MAX_DIGITS and NUMBER.fullmatch(cell) else cell
