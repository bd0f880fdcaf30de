"""The paper's figures and numbers: what is drawn is what the definitions say."""

import csv
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import trapezoid

from probattn import _reference as reference
from probattn.inference.cli import main, showing_commands
from probattn.inference.paper import data
from probattn.inference.paper.report import paper_report
from tests.support.small import MAP_SIZE, cheap_figures


@pytest.fixture(scope="module")
def clouds():
    return {a: [data.cloud(a, seed) for seed in range(3)] for a in (0.2, -0.2)}


@pytest.mark.slow
def test_valid_sequences_of_a_seed_are_as_many_as_the_paper_has(clouds):
    counts = [each.valid for each in clouds[0.2]]
    deviation = math.sqrt(4000 * 0.8465 * 0.1535)  # of one count
    assert np.all(np.abs(np.array(counts) - 3386) < 3 * deviation)
    assert len(set(counts)) == 3  # the seeds draw different samples
    assert {each.valid for each in clouds[-0.2]} == {4000}


@pytest.mark.slow
def test_valid_sequences_are_as_many_as_the_paper_has():
    counts = [data.cloud(0.2, seed).valid for seed in range(20)]
    assert abs(np.mean(counts) - 3386) < 30
    assert len(set(counts)) > 5
    assert {data.cloud(-0.2, seed).valid for seed in range(20)} == {4000}


@pytest.mark.parametrize("coupling", [0.2, -0.2])
def test_a_sequence_of_figure_3_3_by_hand(clouds, coupling):
    cloud = clouds[coupling][0]
    x = np.asarray(2 * jax.random.normal(jax.random.key(0), (4000, 5, 1)))
    for row in (0, 1, int(np.argmin(np.isfinite(cloud.log_density)))):
        means, factors = [], []
        for t in range(5):
            past = x[row, :t, 0]
            weights = np.exp(coupling * x[row, t, 0] * past)
            weights = weights / weights.sum() if t else weights
            means.append(weights @ past)
            factors.append(1 - coupling * (weights @ (past - means[-1]) ** 2))
        residual = x[row, :, 0] - means
        expected = -np.inf
        if min(factors) > 0:
            expected = np.sum(np.log(factors) - residual**2 / 2 - math.log(2 * math.pi) / 2)
        assert cloud.factor[row] == pytest.approx(factors[-1], rel=1e-10)
        assert cloud.variance[row] == pytest.approx((1 - factors[-1]) / coupling, rel=1e-9)
        assert cloud.log_density[row] == pytest.approx(expected, rel=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("coupling", data.FAMILY)
def test_conditional_density_integrates_to_one(coupling):
    grid = np.linspace(-12, 14, 4001)
    density, factor = data.conditional_density(coupling, grid)
    assert trapezoid(density, grid) == pytest.approx(1, abs=1e-9)
    middle = np.argmin(np.abs(grid))
    assert factor[middle] == pytest.approx(1 - coupling, abs=1e-5)


def test_comparisons_state_paper_formula_and_reproduction(clouds):
    rows = {(row.figure, row.quantity): row for row in data.comparisons(clouds)}
    factor = rows["3.2 (b)", "factor at x_3 = 0, a = +0.25"]
    assert (factor.paper, factor.formula, factor.reproduced) == ("0.75", "0.75", "0.75")
    peaks = [row for (figure, _), row in rows.items() if figure == "3.2 (a)"]
    assert [row.paper for row in peaks] == ["0.38", "0.32", "0.52"]
    assert [row.formula for row in peaks] == ["0.399", "0.310", "0.495"]
    assert [row.reproduced for row in peaks] == ["0.399", "0.310", "0.495"]


@pytest.mark.slow
def test_tokens_of_figure_1_1_lie_by_their_determinant():
    path = data.trajectory()
    # Rank one: the boundary is where the product of the two spreads is one.
    np.testing.assert_allclose(path.determinant, 1 - path.query_spread * path.key_spread, atol=1e-5)
    assert path.determinant.min() == pytest.approx(data.NEAREST, abs=0.02)
    assert len(path.tokens) == len(path.determinant) >= 6
    assert all(token in data.TEXT for token in path.tokens)


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, pytest.param(7, marks=pytest.mark.slow)])
def test_the_region_of_proper_conditionals_is_that_of_the_certificate(size):
    for bound in (None, 1.0):
        found = data.mass_map(bound, size=size)
        inside, outside = found.certificate < 1, found.certificate > 1.3
        np.testing.assert_allclose(found.mass[inside], 1, atol=1e-12)
        assert (found.mass[outside] > 1 + 1e-9).any()
        assert inside.any()
        past = np.array([[-found.spread[-1] / 2], [found.spread[-1] / 2], [0.0]])
        rho = reference.certificate(past, found.coupling[:1, None], np.ones((1, 1)), bound=bound)
        assert found.certificate[-1, 0] == pytest.approx(rho[2], rel=1e-9)
    np.testing.assert_allclose(found.mass[:, found.coupling < 1], 1, atol=1e-12)


@pytest.fixture(scope="module", name="report")
def report_fixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper") / "deep" / "figures"
    with pytest.MonkeyPatch.context() as patch:
        cheap_figures(patch)
        return paper_report(folder, seeds=2)


def test_report_writes_figures_with_what_they_show(report):
    comparisons, paths = report
    names = ["figure_1_1", "figure_3_2", "figure_3_3", "proper_region"]
    expected = [f"{name}.{kind}" for name in names for kind in ("png", "csv")] + ["paper.csv"]
    assert [path.name for path in paths] == expected
    assert {path.name for path in paths[0].parent.iterdir()} == set(expected)
    for path in paths:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
    tables = {path.stem: path.read_text().splitlines() for path in paths if path.suffix == ".csv"}
    rows = {name: list(csv.DictReader(lines)) for name, lines in tables.items()}
    assert len(rows["paper"]) == len(comparisons)
    assert len(rows["figure_3_3"]) == 2 * 50
    assert len(rows["figure_3_2"]) == 7 * 401
    assert len(rows["proper_region"]) == 2 * MAP_SIZE**2
    assert {row["bound"] for row in rows["proper_region"]} == {"", "2"}
    x = 2 * jax.random.normal(jax.random.key(0), (50, 5, 1))
    sign, log_abs = reference.log_det_at(x[0], jnp.array([[0.2]]), jnp.ones((1, 1)), 4)
    factor = float(sign * jnp.exp(log_abs))
    assert float(rows["figure_3_3"][0]["factor"]) == pytest.approx(factor, rel=1e-6)


def test_command_prints_the_comparison(report, tmp_path, monkeypatch, capsys):
    asked = []

    def noting(folder, *, progress):
        asked.append((folder, progress))
        return report

    monkeypatch.setattr(showing_commands, "paper_report", noting)
    assert main(["figures", "--out", str(tmp_path)]) == 0
    assert asked == [(tmp_path, True)]
    printed = capsys.readouterr().out
    assert "reproduced" in printed
    assert "0.399" in printed
    for path in report[1]:
        assert f"wrote {path}" in printed.replace("\n", "")
