"""Tables as CSV files: the same whether written row by row or column by column."""

import numpy as np
import pytest

from probattn.inference.runs import csv_tables
from probattn.inference.runs.csv_tables import write_columns, write_table


@pytest.mark.parametrize("length", [0, 1, 5, 6, 7])
def test_columns_make_the_file_that_rows_make(tmp_path, monkeypatch, length):
    monkeypatch.setattr(csv_tables, "_ROWS", 3)
    numbers = np.random.default_rng(0).standard_normal(length)
    numbers[2:4] = np.array([np.nan, -np.inf])[: max(length - 2, 0)]
    columns = {
        "index": range(length),
        "token": [("a", "\n", '"', ",", "\N{SNOWMAN}", "", "b")[i] for i in range(length)],
        "position": np.arange(length),
        "single": (1e-9 * numbers).astype(np.float32),
        "double": 1e9 * numbers,
        "support": numbers > 0,
        "mixed": [True, 0.1 + 0.2, np.float32(1 / 3), None, np.bool_(False), 3, "x"][:length],
    }
    rows = zip(*columns.values(), strict=True)
    expected = write_table(tmp_path / "rows.csv", list(columns), rows).read_bytes()
    assert write_columns(tmp_path / "columns.csv", columns).read_bytes() == expected


def test_columns_of_different_lengths_leave_the_file_as_it_was(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("before")
    with pytest.raises(ValueError, match="shorter"):
        write_columns(path, {"one": range(3), "two": np.arange(2)})
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
