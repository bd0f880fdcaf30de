"""Tables as CSV files, and in Markdown."""

import csv
import gzip
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


def write_packed(path: Path, columns: Mapping[str, np.ndarray], *, digits: int) -> Path:
    """Write a long table of numbers, compressed: the same bytes for the same numbers.

    Args:
        path: of the file, whose name ends in .csv.gz.
        columns: columns of one length by name.
        digits: significant digits of floating-point numbers.
    """
    lines = io.StringIO()
    lines.write(",".join(columns) + "\n")
    shown = [_shown(values, digits) for values in columns.values()]
    lines.writelines(",".join(row) + "\n" for row in zip(*shown, strict=True))
    with (
        replacing(path) as file,
        gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0) as packed,
    ):
        packed.write(lines.getvalue().encode())
    return path


def read_packed(path: Path, *, needed: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """Read a table that `write_packed` wrote, as columns by name.

    Args:
        path: of the file.
        needed: columns that it must have.

    Raises:
        OSError: if there is no such file.
        ValueError: if it is no such table.
    """
    try:
        with gzip.open(path, "rt", encoding="ascii") as stream:
            names = stream.readline().rstrip("\n").split(",")
            values = np.loadtxt(stream, delimiter=",", ndmin=2)
    except (EOFError, gzip.BadGzipFile, ValueError) as error:
        raise ValueError(f"{path}: damaged: {error}") from None
    if values.shape[1] != len(names) or not set(needed) <= set(names):
        raise ValueError(f"{path}: expected a column for each name, {', '.join(needed)} among them")
    return dict(zip(names, values.T, strict=True))


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


def _shown(values: np.ndarray, digits: int) -> list[str]:
    if np.issubdtype(values.dtype, np.floating):
        return [f"{value:.{digits}g}" for value in values.tolist()]
    return [str(value) for value in values.tolist()]


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
