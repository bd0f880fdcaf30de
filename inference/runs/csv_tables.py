"""Tables as CSV files."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from probattn.inference.runs.files import write_text


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence]) -> Path:
    """Write a table, whole or not at all, with seven digits of every floating-point number."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(value) for value in row])
    write_text(path, stream.getvalue())
    return path


def _cell(value: object) -> object:
    if isinstance(value, bool | np.bool_):
        return int(value)
    return f"{value:.7g}" if isinstance(value, float | np.floating) else value
