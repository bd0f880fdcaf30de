"""Tables as CSV files, and in Markdown."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from probattn.inference.runs.files import replacing, write_text

_ROWS = 2**13  # that are in memory at once


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence]) -> Path:
    """Write a table, whole or not at all, with seven digits of every floating-point number."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(value) for value in row])
    write_text(path, stream.getvalue())
    return path


def write_columns(path: Path, columns: Mapping[str, Sequence | np.ndarray]) -> Path:
    """Write a long table, whole or not at all, from columns of one length by name.

    The file is that of `write_table`. Numbers of an array are formatted together, which takes half
    the time, and no more than a part of the text is in memory.
    """
    length = len(next(iter(columns.values())))
    with replacing(path) as file:
        for start in range(0, max(length, 1), _ROWS):
            stream = io.StringIO()
            writer = csv.writer(stream, lineterminator="\n")
            if start == 0:
                writer.writerow(columns)
            parts = (_cells(column[start : start + _ROWS]) for column in columns.values())
            writer.writerows(zip(*parts, strict=True))
            file.write(stream.getvalue().encode())
    return path


def read_table(path: Path) -> list[dict[str, str]]:
    """Read the rows of a table, as text by column.

    Raises:
        OSError: if there is no such file, or it cannot be read.
    """
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def markdown_table(heads: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown, a line for each row."""
    lines = [heads, ("---",) * len(heads), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _cells(values: Sequence | np.ndarray) -> Sequence:
    if not isinstance(values, np.ndarray):
        return [_cell(value) for value in values]
    if values.dtype == bool:
        values = values.astype(np.int8)
    numbers = values.tolist()
    if np.issubdtype(values.dtype, np.floating):
        return [f"{number:.7g}" for number in numbers]
    return numbers


def _cell(value: object) -> object:
    if isinstance(value, bool | np.bool_):
        return int(value)
    return f"{value:.7g}" if isinstance(value, float | np.floating) else value
