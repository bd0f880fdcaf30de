"""Files of results: which there are, and what is left of earlier ones."""

import shutil

import numpy as np
import pytest

from probattn.inference import ComparedRun, load_run, to_datatree
from probattn.inference.comparison.predictive import Predictions, Reliability
from probattn.inference.figures import posterior as posterior_plots
from probattn.inference.figures import report
from probattn.inference.figures.report import compared_report, posterior_report


def predicted():
    bins = np.array([0.25, 0.75])
    reliability = Reliability(bins, bins, np.array([1, 1]))
    return Predictions(1, -1.0, 2.0, reliability, selective=None)


def sampled(draws):
    draws = np.asarray(draws, float)
    known = draws[~np.isnan(draws)]
    return ComparedRun(
        "nuts",
        "language",
        inference="nuts",
        smallest_margin=float(np.median(known)) if known.size else np.nan,
        smallest_margin_draws=draws,
        divergences=0,
    )


def test_figures_of_an_earlier_comparison_do_not_stay_beside_the_new_table(tmp_path):
    point = ComparedRun("map", "language", predictions=predicted())
    both = compared_report([point, sampled([[0.5, 0.6, 0.7]])], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in both}
    assert len(both) == 3
    (tmp_path / "notes.txt").touch()
    [table] = compared_report([ComparedRun("bare", "language")], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {table.name, "notes.txt"}


@pytest.mark.parametrize(
    ("draws", "drawn"), [([[0.5, np.nan, 0.7]], 1), ([[0.0, 0.0, 0.0]], 1), ([[np.nan] * 3], 0)]
)
def test_a_posterior_is_drawn_if_any_of_its_smallest_margins_is_known(draws, drawn, tmp_path):
    unknown = ComparedRun("map", "language", smallest_margin=np.nan)
    _, *figures = compared_report([sampled(draws), unknown], tmp_path)
    assert [path.name for path in figures] == ["smallest_margin.png"] * drawn


@pytest.mark.slow
@pytest.mark.parametrize("unknown", ["one draw", "all draws"])
def test_draws_without_a_smallest_margin_do_not_end_the_report(
    unknown, language_run, tmp_path, monkeypatch
):
    run = load_run(shutil.copytree(language_run.path, tmp_path / "run"))
    shutil.rmtree(run.path / "figures", ignore_errors=True)
    drawn, draw = [], posterior_plots.smallest_margin

    def with_unknown(run, **options):
        tree = to_datatree(run, **options)
        smallest = tree["posterior"]["smallest_margin"].values
        smallest[(1, 3) if unknown == "one draw" else ...] = np.nan
        return tree

    def noting(draws):
        drawn.append(draws)
        return draw(draws)

    monkeypatch.setattr(report, "to_datatree", with_unknown)
    monkeypatch.setattr(posterior_plots, "smallest_margin", noting)
    _, paths = posterior_report(run)
    assert all(path.stat().st_size > 1000 for path in paths)
    names = {path.name for path in paths}
    assert {"posterior.nc", "support_probability.png"} <= names
    assert ("smallest_margin.png" in names) == (unknown == "one draw")
    assert [np.isnan(draws).sum() for draws in drawn] == ([1] if unknown == "one draw" else [])
