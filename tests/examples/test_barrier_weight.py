"""The comparison of weighted MAPs with the posterior: its parts against oracles, then all of it."""

import math
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import lognorm, norm

from probattn import _reference
from probattn.models import LatentEmbeddingsConfig, observed_embeddings
from probattn.models.coupling import attention_weights_of
from tests.support.project import ROOT, scripts_fixture
from tests.support.tiny_run import tiny_text

FOLDER = ROOT / "examples" / "barrier_weight"
NAMES = ("compare_weights", "measured", "observed", "weighted_maps", "weighted_report")


scripts = scripts_fixture(FOLDER, NAMES)


def model_of(width, sequences, length):
    config = LatentEmbeddingsConfig(
        width=width, bound=1.5, sequences=sequences, length=length, coupling="bounded"
    )
    return partial(observed_embeddings, config=config)


@pytest.mark.usefixtures("quick_compilation")
def test_density_parts_are_those_of_the_formula(scripts):
    width, bound = 2, 1.5
    x = np.random.default_rng(0).normal(size=(2, 4, width))
    parts = jax.jit(partial(scripts["weighted_maps"].density_parts, model_of(width, 2, 4)))
    found, expected = [], []
    for factor, turn, scale in (([[0.7, 0], [0.4, 1.1]], 0.3, 0.8), (np.eye(2), -0.6, 1.2)):
        factor = np.array(factor, float)
        values = {"repulsion": factor, "rotation": np.array([turn]), "scale": np.array(scale)}
        found.append(parts(values, jnp.asarray(x)))
        wishart, rotation = factor @ factor.T, turn * np.array([[0, -1], [1, 0]])
        coupling = (
            np.eye(2) - width / (width + 1) * wishart + rotation / math.sqrt(width + 1)
        ) / bound**2
        weights = [np.asarray(w) for w in attention_weights_of(jnp.asarray(coupling))]
        residual = np.stack([_reference.residual(one, *weights, bound=bound) for one in x])
        blocks = np.stack([_reference.jacobian_blocks(one, *weights, bound=bound) for one in x])
        expected.append(
            (
                norm.logpdf(residual, scale=scale).sum(),
                np.linalg.slogdet(blocks)[1].sum(),
                # With d + 1 degrees of freedom the determinant drops out of Wishart's density.
                -width / 2 * np.trace(wishart) - turn**2 / 2 + lognorm.logpdf(scale, 1.0),
            )
        )
    (first, second), (one, other) = np.array(found), np.array(expected)
    np.testing.assert_allclose(first[:2], one[:2], rtol=1e-9)
    np.testing.assert_allclose(second[:2], other[:2], rtol=1e-9)
    np.testing.assert_allclose(first[2] - second[2], one[2] - other[2], rtol=1e-9)  # a constant


def scalar_parts(x, factor, scale, bound):
    """The three terms in one dimension, position by position."""
    a = (1 - factor**2 / 2) / bound**2
    residual = barrier = 0.0
    for sequence in x[..., 0]:
        phi = sequence / np.sqrt(1 + sequence**2 / bound**2)
        for t, value in enumerate(sequence):
            weights = np.exp(a * value * phi[:t])
            weights = weights / weights.sum() if t else weights
            mean = weights @ phi[:t]
            residual += norm.logpdf(value - mean, scale=scale)
            barrier += math.log(1 - a * (weights @ phi[:t] ** 2 - mean**2))
    return residual, barrier, -(factor**2) / 2 + lognorm.logpdf(scale, 1.0)


@pytest.mark.usefixtures("quick_compilation")
def test_maxima_are_where_an_oracle_in_one_dimension_finds_them(scripts):
    x = np.random.default_rng(1).normal(size=(3, 5, 1))

    def negative(at, barrier, residual):
        of_residual, of_barrier, prior = scalar_parts(x, *np.exp(at), 1.5)
        return -(residual * of_residual + barrier * of_barrier + prior)

    options = {"xatol": 1e-7, "fatol": 1e-11}
    density = scripts["weighted_maps"].WeightedDensity(model_of(1, 3, 5), jnp.asarray(x))
    for weights in ((3.0, 1.0), (2.0, 0.0)):
        expected = minimize(negative, [0, 0], weights, method="Nelder-Mead", options=options)
        found = density.maximise(*weights, starts=2)
        assert found.agreeing == 2
        assert found.gradient_norm < 1e-5
        np.testing.assert_allclose(found.values["repulsion"], np.exp(expected.x[0]), rtol=1e-4)
        np.testing.assert_allclose(found.values["scale"], np.exp(expected.x[1]), rtol=1e-4)


def test_diagnoses_tell_chains_that_differ_from_chains_that_agree(scripts):
    measured = scripts["measured"]
    draws = np.random.default_rng(0).normal(size=(4, 500, 3))
    constant = np.ones((4, 500, 1))
    same = measured.diagnose(np.concatenate([draws, constant], -1))
    assert measured.converged({"all": same}, 0)
    assert not measured.converged({"all": same}, 1)
    draws[0, :, 2] += 1  # one of the three
    assert measured.diagnose(draws).r_hat > 1.05
    assert not measured.converged({"all": measured.diagnose(draws)}, 0)


def test_mixture_averages_densities_and_not_their_logarithms(scripts):
    densities = np.array([[-1.0, -2.0]])
    expected = math.log((math.exp(-10) + math.exp(-20)) / 2) / 10
    assert scripts["measured"].mixture(densities, 10) == pytest.approx(expected)


def test_projection_keeps_what_varies_most_in_units_of_its_size(scripts):
    generator = np.random.default_rng(0)
    x = 3 + generator.normal(size=(5, 20, 3)) * np.array([1.0, 0.01, 2.0])
    train, held_out, share = scripts["observed"].project(x, x[:2], 2)
    assert np.mean(train**2) == pytest.approx(1)
    np.testing.assert_allclose(held_out, train[:2])
    np.testing.assert_allclose(train.mean((0, 1)), 0, atol=1e-12)
    assert share > 0.999
    first = x[..., 2] - x[..., 2].mean()
    assert abs(np.corrcoef(first.ravel(), train[..., 0].ravel())[0, 1]) > 0.99


def test_answers_name_the_weights_within_the_interval(scripts):
    report = scripts["weighted_report"]
    quantities = scripts["measured"].QUANTITIES
    posterior = [
        {"data": "one", "quantity": name, "mean": "0.5", "low": "0.4", "high": "0.6"}
        for name in quantities
    ]
    maps = [
        {"data": "one", "kind": kind, "weight": str(weight)} | dict.fromkeys(quantities, value)
        for kind, weight, value in (
            *(("full", 1.0, "0.45"), ("full", 0.1, "0.6"), ("full", 10.0, "0.61")),
            ("margin only", 1.0, "0.9"),
        )
    ]
    table = report.answers_table(posterior, maps)
    line = f"| one | {quantities[0]} | 0.500 (0.400 to 0.600) | 0.450 | 0.1, 1 | none |"
    assert line in table.splitlines()


def test_committed_tables_are_made_from_the_committed_results(scripts):
    report, results = scripts["weighted_report"], FOLDER / "results"
    made = report.tables(*report.read_whole(results))
    assert made == (results / "table.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.slow
def test_whole_comparison_leaves_tables_and_a_figure(scripts, monkeypatch, tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(tiny_text(), encoding="utf-8")
    sizes = {"width": 2, "sequences": 2, "length": 6, "fit-steps": 10, "starts": 2}
    sizes |= {"warmup": 30, "draws": 30, "weights": 1}
    flags = [part for name, size in sizes.items() for part in (f"--{name}", str(size))]
    arguments = ["--text", str(text), "--only", "simulated", "tinyshakespeare", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["compare_weights.py", *arguments, *flags])
    scripts["compare_weights"].main()
    assert "weights.png" in capsys.readouterr().out
    maps, posterior = (
        scripts["weighted_report"].read_results(out, n) for n in ("maps", "posterior")
    )
    assert [row["data"] for row in maps] == ["simulated"] * 2 + ["tinyshakespeare"] * 2
    assert all(float(row["gradient norm"]) < 1e-4 for row in maps)
    rows = {(row["data"], row["quantity"]): row for row in posterior}
    assert ("simulated", "truth, smallest margin") in rows
    assert ("tinyshakespeare", "every margin, the worst of 8") in rows
    support = scripts["weighted_report"].read_results(out, "support")
    assert len(support) == 2 * 6  # of the text alone
    assert sum(float(row["support probability"]) for row in support) == pytest.approx(2)
    for row in rows.values():
        if row["low"] != "nan":
            assert float(row["low"]) <= float(row["mean"]) <= float(row["high"]), row
    assert "| simulated | smallest margin |" in (out / "table.md").read_text(encoding="utf-8")


def test_the_support_token_of_a_sequence_is_counted_in_every_draw(scripts):
    margins = np.random.default_rng(3).random((2, 7, 3 * 4))  # chains, draws, 3 sequences of 6
    shown = np.array([list("abcdef"), list("ghijkl"), list("mnopqr")])
    rows = scripts["compare_weights"].support_rows(shown, margins)
    counts = np.zeros(shown.shape)
    for draw in margins.reshape(14, 3, 4):
        for sequence, of_tokens in enumerate(draw):
            counts[sequence, 2 + list(of_tokens).index(min(of_tokens))] += 1
    places = list(np.ndindex(3, 6))
    assert [row[:3] for row in rows] == [(*place, shown[place]) for place in places]
    np.testing.assert_allclose([row[4] for row in rows], counts.ravel() / 14)
    np.testing.assert_allclose(rows[2][3], margins[..., 0].mean())


def test_command_knows_its_couplings(scripts):
    values = {"free_coupling": np.eye(2)}
    with jax.enable_x64(True):
        found = scripts["compare_weights"].coupling_of(values, "free", 2, None)
    np.testing.assert_allclose(found, np.eye(2))
