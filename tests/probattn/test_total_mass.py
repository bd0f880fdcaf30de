"""Mass of a conditional against numerical integration of the definition, and by other paths."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats

import probattn as pa
from probattn.process import marginal_ratio_monte_carlo
from tests.support.project import ROOT

ONE = np.ones((1, 1))


def integrated(past, a, scale, bound=None):
    """The formula by Gauss' rule on 200,000 cells, blind to where the determinant changes sign."""
    past = np.array(past)
    if bound is not None:
        past = past / np.sqrt(1 + past**2 / bound**2)
    edges = np.linspace(min(past) - 10 * scale, max(past) + 10 * scale, 200_001)
    nodes, rule = np.polynomial.legendre.leggauss(3)
    half = np.diff(edges)[:, None] / 2
    x = edges[:-1, None] + half * (1 + nodes)
    weights = np.exp(a * x[..., None] * past - np.max(a * x[..., None] * past, -1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mean = weights @ past
    factor = 1 - a * np.sum(weights * (past - mean[..., None]) ** 2, axis=-1)
    return np.sum(half * rule * np.maximum(factor, 0) * scipy.stats.norm.pdf(x, mean, scale))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("bound", [None, 2.0])
def test_mass_on_the_line_is_the_integral_of_the_definition(seed, bound):
    rng = np.random.default_rng(seed)
    past, a, scale = rng.normal(0, 3, 5), rng.uniform(0, 1), rng.uniform(0.3, 2)
    mass = pa.conditional_mass(past[:, None], a * ONE, ONE, scale, bound=bound)
    assert mass == pytest.approx(integrated(past, a, scale, bound), abs=1e-9)


@pytest.mark.parametrize(
    ("gap", "mass"), [(4.0, 1.0), (4.5, 1.0016), (5.0, 1.1237), (6.0, 1.4900), (8.0, 1.9335)]
)
def test_masses_of_the_documentation(gap, mass):
    past = np.array([[-gap / 2], [gap / 2]])
    assert pa.conditional_mass(past, 0.2 * ONE, ONE, 1.0) == pytest.approx(mass, abs=5e-5)
    documented = {4.0: "1"}.get(gap, f"{mass:.4f}")
    page = ROOT / "docs" / "mathematics.md"
    [row] = [line for line in page.read_text().splitlines() if line.startswith("| mass |")]
    assert documented in row.replace("|", " ").split()


def test_the_fold_of_the_design_has_mass_1_98():
    mass = pa.conditional_mass([[-4.0], [4.0]], 0.3 * ONE, ONE, 1.0)
    assert mass == pytest.approx(integrated([-4.0, 4.0], 0.3, 1.0), abs=1e-9)
    assert round(mass, 4) == 1.9825


@pytest.mark.parametrize("seed", range(5))
def test_a_repulsive_conditional_has_mass_one(seed):
    rng = np.random.default_rng(seed)
    past, a = rng.normal(0, 10, (6, 1)), -rng.gamma(2.0)
    assert pa.conditional_mass(past, a * ONE, ONE, 1.0) == pytest.approx(1, abs=1e-13)


@pytest.mark.parametrize(("size", "coupling"), [(40.0, 8.0), (1e4, 1e4)])
def test_a_sharp_fold_is_found(size, coupling):
    """Where attention switches within a fraction of sigma, between tokens far apart."""
    mass = pa.conditional_mass([[-size], [0.9 * size]], coupling * ONE, ONE, 1.0)
    assert mass == pytest.approx(2, abs=1e-9)  # a residual near 0 has a preimage at either token


def test_a_fold_is_found_where_weights_underflow():
    """The weights underflow on both sides of a narrow fold."""
    gap, a = 1e4, 0.1
    found = pa.conditional_mass([[-1.0], [gap]], [[a]], [[1.0]], 1.0)
    x = np.linspace(-0.02, 0.02, 4_000_001)  # the fold is where the logits are equal
    weight = 1 / (1 + np.exp(-a * x * (gap + 1)))
    mean = -1 + weight * (gap + 1)
    slope = 1 - a * weight * (1 - weight) * (gap + 1) ** 2
    folded = np.exp(-((x - mean) ** 2) / 2) / np.sqrt(2 * np.pi) * np.minimum(slope, 0)
    assert found == pytest.approx(1 - np.trapezoid(folded, x), abs=1e-4)
    assert found > 1.8


def test_the_split_of_the_coupling_does_not_matter():
    past = np.array([[-3.0], [2.5], [0.1]])
    wide = pa.conditional_mass(past, np.array([[0.2, 0.4]]), np.array([[1.0, 0.5]]), 1.3)
    narrow = pa.conditional_mass(past, ONE * 0.4 / math.sqrt(2), ONE, 1.3)
    assert wide == pytest.approx(narrow, abs=1e-12)


@pytest.mark.parametrize("past", [np.zeros((0, 1)), [[3.0]], np.zeros((0, 2)), [[1.0, 2.0]]])
def test_a_past_without_spread_changes_nothing(past):
    width = np.shape(past)[1]
    assert pa.conditional_mass(past, 9 * np.eye(width), np.eye(width), 1.0) == 1


def test_a_bounded_context_has_mass_one_inside_its_regime():
    past = np.array([[-40.0], [39.0], [3.0]])
    assert pa.conditional_mass(past, 0.99 * ONE, ONE, 1.0) > 1.9
    inside = pa.conditional_mass(past, 0.99 * ONE, ONE, 1.0, bound=1.0)
    assert inside == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("angle", [0.0, 0.6])
def test_a_fold_along_one_direction_of_the_plane_has_the_mass_of_the_line(angle):
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    past = np.array([[-3.0, 0.0], [3.0, 0.0], [0.5, 0.0]])
    matrix = np.diag([0.3, 0.0]) * math.sqrt(2)
    mass = pa.conditional_mass(past @ turn.T, turn @ matrix, turn, 1.0, tolerance=1e-5)
    expected = pa.conditional_mass(past[:, :1], 0.3 * ONE, ONE, 1.0)
    assert mass == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("scale", [0.2, 0.05, 0.01])
def test_a_narrow_fold_of_the_plane_is_found(scale):
    past = np.array([[-3.0, 0.0], [3.0, 0.0], [0.5, 0.0]])
    weights = np.diag([0.3, 0.0]) * math.sqrt(2), np.eye(2)
    expected = pa.conditional_mass(past[:, :1], 0.3 * ONE, ONE, scale)
    assert pa.conditional_mass(past, *weights, scale) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spread", [2.0, 10.0])
def test_a_repulsive_conditional_of_the_plane_has_mass_one(seed, spread):
    rng = np.random.default_rng(seed)
    past, weights = spread * rng.normal(size=(4, 2)), rng.normal(size=(2, 2)) / 2
    assert pa.conditional_mass(past, weights, -weights, 1.0) == pytest.approx(1, abs=2e-6)


@pytest.mark.slow
def test_tokens_far_apart_in_the_plane():
    past, coupling = np.array([[0.0, 0.0], [100.0, 3.0]]), -0.3 * math.sqrt(2) * np.eye(2)
    assert pa.conditional_mass(past, coupling, np.eye(2), 1.0) == pytest.approx(1, abs=2e-6)


def test_a_coupling_too_sharp_for_the_plane_is_refused():
    with pytest.raises(RuntimeError, match=r"the coupling 5657 is too sharp for scale 1"):
        pa.conditional_mass([[-40.0, 0.0], [36.0, 0.0]], 8e3 * np.eye(2), np.eye(2), 1.0)


@pytest.mark.slow
def test_mass_in_the_plane_is_that_of_the_distribution():
    """By Monte Carlo over the log density of CausalAttention, another path altogether."""
    past = jnp.array([[3.1, 3.0], [-2.7, -0.2], [0.5, -1.2], [-1.2, -0.4]])
    w_query, w_key = jnp.array([[0.4, -0.3], [1.1, 0.2]]), jnp.eye(2)
    mass = pa.conditional_mass(past, w_query, w_key, 1.0, tolerance=1e-4)
    # The past itself must have a density: the ratio is that of four tokens to five.
    process = pa.CausalAttention(w_query, w_key, 1.0, 4)
    assert jnp.isfinite(process.log_prob(past))
    ratio = marginal_ratio_monte_carlo(
        jax.random.key(0),
        lambda x: pa.CausalAttention(w_query, w_key, 1.0, x.shape[-2]).log_prob(x),
        past,
        dist.MultivariateStudentT(5.0, past.mean(0), 2.0 * jnp.eye(2)),
        num_samples=200_000,
    )
    assert mass > 1.4
    assert mass == pytest.approx(ratio.value, abs=4 * ratio.error)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"past": np.zeros((3, 3)), "w_query": np.eye(3), "w_key": np.eye(3)}, "for d = 1 and d ="),
        ({"past": np.zeros(3)}, "past has shape (3,)"),
        ({"past": np.zeros((3, 2))}, "expected (..., T, d) with d = 1"),
        ({"scale": 0.0}, "scale is 0.0: expected a finite number > 0"),
        ({"scale": math.nan}, "scale is nan"),
        ({"bound": -1.0}, "bound is -1.0: expected a finite number > 0"),
        ({"tolerance": 0.0}, "tolerance is 0.0"),
        ({"past": np.array([[1.0], [math.inf]])}, "finite numbers only"),
        ({"w_key": ONE * math.nan}, "finite numbers only"),
    ],
)
def test_bad_input(options, reason):
    given = {"past": np.zeros((3, 1)), "w_query": ONE, "w_key": ONE, "scale": 1.0} | options
    with pytest.raises(ValueError, match=re.escape(reason)):
        pa.conditional_mass(**given)


@pytest.mark.slow
def test_an_integral_that_does_not_converge_is_an_error():
    past = np.array([[-3.0, 0.0], [3.0, 1.0], [0.5, 2.0]])
    with pytest.raises(RuntimeError, match="did not reach the tolerance 1e-15"):
        pa.conditional_mass(past, np.eye(2), np.eye(2), 1.0, tolerance=1e-15)
