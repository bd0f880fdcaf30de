"""Tables as CSV files, by rows, by columns and compressed."""

import gzip

import numpy as np
import pytest

from probattn.inference.runs import csv_tables
from probattn.inference.runs.csv_tables import read_packed, write_columns, write_packed, write_table


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


def test_a_packed_table_is_the_same_bytes_and_reads_back(tmp_path):
    numbers = np.random.default_rng(0).standard_normal(9).astype(np.float32)
    numbers[0] = np.nan
    columns = {"place": np.arange(9), "number": numbers}
    one, other = (write_packed(tmp_path / f"{n}.csv.gz", columns, digits=3) for n in "ab")
    assert one.read_bytes() == other.read_bytes()
    lines = gzip.decompress(one.read_bytes()).decode().splitlines()
    assert lines == ["place,number", *(f"{n},{v:.3g}" for n, v in enumerate(numbers))]
    found = read_packed(one, needed=("number",))
    np.testing.assert_array_equal(found["place"], np.arange(9))
    np.testing.assert_allclose(found["number"], numbers, rtol=6e-3)
    with pytest.raises(ValueError, match="expected a column for each name, other among them"):
        read_packed(one, needed=("other",))
    other.write_bytes(one.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"b\.csv\.gz: damaged"):
        read_packed(other)
