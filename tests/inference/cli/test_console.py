"""Tables of margins, some of which are not known, and of what noise does."""

import dataclasses
import io
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from probattn.inference.cli.console import (
    print_compared,
    print_margins,
    print_sensitivity,
)
from probattn.inference.cli.proofs import print_folds
from probattn.inference.comparison.compare import ComparedRun, _margins
from probattn.inference.evaluation.folding_texts import FoldingText
from probattn.inference.evaluation.intervals import Estimate
from probattn.inference.evaluation.stage_certificates import StageCertificate
from probattn.inference.evaluation.token_margins import TextMargins, TokenMargins, write_csv

MARGIN = np.array([1, 1, 0.5, -0.25, 0.75, 0.5])
RADIUS = np.array([np.inf, np.inf, np.inf, 0, 0.25, 0.125])


def stage(label, margin):
    ones = np.ones(len(margin))
    return TokenMargins(label, margin, ones, ones, ones, margin == np.nanmin(margin), RADIUS)


def margins_of(*stages):
    positions = np.arange(len(MARGIN))
    return TextMargins(
        "a text", "abcdef", positions, 0 * positions, positions[:1], stages, (), True
    )


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


def test_what_no_text_can_do_is_printed_of_every_stage(margins):
    proved = StageCertificate("one", 0.7, ("a", "b"), (0, 1), 0.6)
    likely = StageCertificate("two", 12.5, ("\x1b", "b"), (0, 3), 11.25)
    unknown = StageCertificate("three", 3.0, ("a", "b"), (0, 1), math.nan)
    found = dataclasses.replace(margins, certificates=(proved, likely, unknown))
    lines = printed(found).splitlines()
    assert "one: no text can fold it (rho = 0.70)" in lines
    folding = r"as '\x1b' and 'b' do with equal weights (11.25)"
    assert f"two: a text may fold it (rho = 12.50), {folding}" in lines
    assert "three: a text may fold it (rho = 3.00)" in lines


def test_what_is_proved_of_positions_is_told_apart():
    # Certified for every query are 1 of the 4 positions >= 2, at the present weights 3.
    rho = np.array([0, 0, 0.5, 2, 1, 1.5])
    found = dataclasses.replace(stage("one", MARGIN), certificate=rho)
    lines = printed(margins_of(found)).splitlines()
    header = next(line for line in lines if "for every query" in line)
    row = lines[lines.index(header) + 2]
    names, values = ([cell.strip() for cell in re.split("[│┃]", line)] for line in (header, row))
    cells = dict(zip(names, values, strict=True))
    assert (cells["for every query"], cells["here"]) == ("25.0 %", "75.0 %")
    assert (cells["radius, 5 %"], cells["radius, median"]) == ("0.000", "0.125")
    plain = printed(margins_of(dataclasses.replace(found, radius=None)))  # it was not asked for
    assert "25.0 %" in plain
    assert "radius" not in plain


def test_a_text_that_folds_is_printed_and_one_that_was_not_found_is_said():
    stream = io.StringIO()
    fold = FoldingText("two", np.array([1, 0]), "ba", -0.5)
    print_folds(Console(file=stream, width=120), {"two": fold, "three": None})
    assert stream.getvalue().splitlines() == [
        "two: the last token of 'ba' folds it (margin -0.500)",
        "three: no text that folds it was found",
    ]


def test_a_stage_without_any_margin_leaves_the_others_their_rows(margins):
    nothing = TokenMargins("none", *[np.full(6, np.nan)] * 4, np.zeros(6, bool), np.full(6, np.nan))
    out = printed(margins_of(nothing, *margins.stages))
    assert "-0.250" in next(line for line in out.splitlines() if " one " in line)
    assert "none: 6 of 6 margins are not known" in out


def test_the_table_keeps_every_row_and_cell(margins, tmp_path):
    write_csv(margins, tmp_path / "margins.csv")
    header, *rows = (tmp_path / "margins.csv").read_text().splitlines()
    cells = [dict(zip(header.split(","), row.split(","), strict=True)) for row in rows]
    assert [row["two_sigma_min"] for row in cells] == ["1", "1", "0.5", "-0.25", "nan", "0.5"]
    assert [float(row["one_sigma_min"]) for row in cells] == list(MARGIN)


def test_a_table_of_sensitivity_has_room_in_80_columns():
    comparisons = [
        SimpleNamespace(
            statistic=statistic,
            within=within,
            stage=f"layer 1 head {head}",
            estimate=Estimate(-0.123, -0.456, -0.012),
        )
        for statistic in ("margin", "embedding_margin", "support")
        for within in ("text", "position", "token", "loss")
        for head in (1, 2)
    ]
    found = SimpleNamespace(
        name="a text",
        kind="gaussian",
        level=0.5,
        loss=np.ones(6),
        noisy_loss=np.ones(6),
        comparisons=comparisons,
        stages=[],
        index=np.arange(6),
        tokens="abcdef",
        post_hoc_converged=True,
    )
    stream = io.StringIO()
    print_sensitivity(Console(file=stream, width=80), found)
    lines = stream.getvalue().splitlines()
    assert max(len(line) for line in lines if line[0] in "┏┃┡│└") <= 80
    assert sum(line.count("-0.456, -0.012") for line in lines) == len(comparisons)
    assert sum(line.count("layer 1 head 2") for line in lines) == 3


def test_margins_that_are_not_known_are_left_out_of_a_comparison_and_counted():
    margin = np.ones((1, 2, 3, 5))
    margin[0, 0, 1, 2:] = np.nan, 0.25, 0.5
    margin[0, 1, 1, 4] = 0.75
    summary = _margins(margin)
    assert summary["smallest_margin"] == 0.5
    assert summary["smallest_margin_draws"].tolist() == [[0.25, 0.75]]
    assert summary["margin_quantiles"][0.5] == 1
    assert summary["unknown_margins"] == 1
    stream = io.StringIO()
    nothing = _margins(np.full((1, 1, 3, 5), np.nan))
    assert np.isnan([nothing["smallest_margin"], *nothing["margin_quantiles"].values()]).all()
    assert np.isnan(nothing["smallest_margin_draws"]).all()
    compared = [ComparedRun("a run", "latent", **summary), ComparedRun("b", "latent")]
    print_compared(Console(file=stream, width=80), compared)
    assert "a run: 1 margins are not known (NaN) and left out" in stream.getvalue()
