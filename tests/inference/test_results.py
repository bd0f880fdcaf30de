"""Results as Python shows and keeps them."""

import dataclasses

import numpy as np

from probattn.inference import FitResult, PosteriorResult, RunConfig, load_run
from probattn.inference.runs.checks import check_same_config


def test_a_posterior_is_shown_in_a_line_and_kept_in_a_set():
    draws = {"A": np.zeros((4, 1000, 3, 3)), "mean": np.zeros((4, 1000))}
    statistics = {"diverging": np.eye(4, 1000, dtype=bool)}
    result = PosteriorResult("nuts", draws, print, (np.zeros(1000),), statistics=statistics)
    shown = (
        "PosteriorResult(method='nuts', chains=4, draws=1000, divergences=4, sites=['A', 'mean'])"
    )
    assert repr(result) == shown
    other = dataclasses.replace(result)
    assert {result, other} == {other, result}
    assert result != other


def test_runs_and_fits_are_kept_in_a_set_and_shown_in_short(tiny_run):
    again = load_run(tiny_run.path)
    assert {tiny_run, again} == {tiny_run}
    results = [FitResult(run, 1.5, 2.0, [{"step": 1}]) for run in (tiny_run, again)]
    assert set(results) == {results[0]}
    assert len(repr(results[0])) < 2500


def test_a_default_that_is_a_value_in_the_run_is_no_other_configuration(tiny_run):
    """A run of an older version has warm-up of 100 steps in its file."""
    run = dataclasses.replace(tiny_run, config=RunConfig().resolved())
    assert run.config.fit.warmup == 100
    check_same_config(run, RunConfig())
