"""Tables of margins, some of which are not known."""

import io

import numpy as np
import pytest
from rich.console import Console

from probattn.inference.cli.console import print_margins
from probattn.inference.evaluation.token_margins import TextMargins, TokenMargins, write_csv

MARGIN = np.array([1, 1, 0.5, -0.25, 0.75, 0.5])


def stage(label, margin):
    ones = np.ones(len(margin))
    return TokenMargins(label, margin, ones, ones, ones, margin == np.nanmin(margin))


def margins_of(*stages):
    positions = np.arange(len(MARGIN))
    return TextMargins("a text", "abcdef", positions, 0 * positions, positions[:1], stages, True)


def printed(margins):
    stream = io.StringIO()
    print_margins(Console(file=stream, width=120), margins)
    return stream.getvalue()


@pytest.fixture(name="margins")
def margins_fixture():
    unknown = np.where(np.arange(6) == 4, np.nan, MARGIN)
    return margins_of(stage("one", MARGIN), stage("two", unknown), stage("three", MARGIN))


def test_a_margin_that_is_not_known_is_counted_and_named(margins):
    out = printed(margins)
    for label in ("one", "two", "three"):
        assert "-0.250" in next(line for line in out.splitlines() if f" {label} " in line)
    lines = [line for line in out.splitlines() if "not known" in line]
    assert lines == [
        "two: 1 of 6 margins are not known (NaN) and left out, the first at token 4, 'e'"
    ]
    assert "not known" not in printed(margins_of(stage("one", MARGIN)))


def test_a_stage_without_any_margin_leaves_the_others_their_rows(margins):
    nothing = TokenMargins("none", *[np.full(6, np.nan)] * 4, np.zeros(6, bool))
    out = printed(margins_of(nothing, *margins.stages))
    assert "-0.250" in next(line for line in out.splitlines() if " one " in line)
    assert "none: 6 of 6 margins are not known" in out


def test_the_table_keeps_every_row_and_cell(margins, tmp_path):
    write_csv(margins, tmp_path / "margins.csv")
    header, *rows = (tmp_path / "margins.csv").read_text().splitlines()
    cells = [dict(zip(header.split(","), row.split(","), strict=True)) for row in rows]
    assert [row["two_sigma_min"] for row in cells] == ["1", "1", "0.5", "-0.25", "nan", "0.5"]
    assert [float(row["one_sigma_min"]) for row in cells] == list(MARGIN)
