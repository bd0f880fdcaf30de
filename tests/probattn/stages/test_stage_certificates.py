"""The certificate of stages: its value from loops, and an adversary who changes the query."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probattn as pa
from tests.support import real_attention as real
from tests.support.dense import quick_jit

pytestmark = pytest.mark.usefixtures("strict_promotion", "strict_ranks")


def by_loops(stage):
    """rho_t of a stage of one head, from its definition: every pair of every past."""
    rank, length = stage.keys.shape[-1], len(stage.values)
    scale = rank**-0.5 if stage.scale is None else stage.scale
    points = np.asarray(stage.values) @ np.asarray(stage.w_query)
    transforms = np.broadcast_to(np.eye(rank), (length, rank, rank))
    transforms = transforms if stage.transforms is None else np.asarray(stage.transforms)
    counts = (0.0, 1.0) if stage.cap else (1.0,)
    rho = np.zeros(length)
    for t in range(length):
        seen = range(max(t - (stage.window or length), 0), t)
        keys = scale * np.asarray(stage.keys) @ transforms[t]
        moves = [
            (points[s] - points[u], one * keys[s] - two * keys[u])
            for s in seen
            for u in seen
            if s != u
            for one in counts
            for two in counts
        ]
        if not moves:
            continue
        widest = [max(np.linalg.norm(move[side]) for move in moves) for side in (0, 1)]
        bounds = [widest[0] * widest[1] / 4]
        for square in (widest[1] / widest[0]) * np.array([0.5, 1.0, 2.0]):
            a = np.sqrt(square)
            bounds.append(max(np.linalg.norm(a * u + z / a) / 2 for u, z in moves) ** 2 / 4)
        rho[t] = min(bounds)
    return rho


def of_head(name, shrunk=1.0):
    options = dataclasses.replace(real.OPTIONS[name], heads=1, groups=1, query_norm=False)
    n = real.numbers(options)
    n["w_query"] = n["w_query"] * shrunk
    stage = real.layer(options, n).stage(n["x"])
    return jax.tree.map(
        lambda a: jnp.asarray(a)[0] if np.ndim(a) == 3 and len(a) == 1 else jnp.asarray(a), stage
    )


@pytest.mark.parametrize("name", ["all", pytest.param("rotary", marks=pytest.mark.slow)])
def test_the_certificate_is_that_of_all_pairs(name):
    stage = of_head(name)
    rho = quick_jit(pa.certificate)(stage)
    expected = by_loops(stage)
    np.testing.assert_allclose(rho, expected, rtol=1e-11, atol=1e-12)
    assert (np.asarray(rho) >= expected).all()


def test_rounding_never_proves_more_than_the_exact_numbers():
    """Three of six would be too small if what single precision may lose were not added."""
    single = jax.tree.map(lambda part: part.astype(jnp.float32), of_head("all"))
    exact = by_loops(jax.tree.map(lambda part: np.asarray(part, np.float64), single))
    rho = quick_jit(pa.certificate)(single)
    assert rho.dtype == jnp.float32
    assert (np.asarray(rho) >= exact).all()
    np.testing.assert_allclose(rho, exact, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rotary", "capped", "all"])
def test_no_query_folds_what_is_certified(name):
    """Real parts of eigenvalues under random queries of every length stay above 1 - rho_t."""
    stage = of_head(name, shrunk=0.35)
    rho = np.asarray(pa.certificate(stage))
    rng = np.random.default_rng(6)
    queries = rng.standard_normal((400, *stage.queries.shape))
    queries = jnp.asarray(queries * 10.0 ** rng.uniform(-2, 2, (400, 1, 1)))
    blocks = jax.jit(lambda q: pa.reduced_blocks(dataclasses.replace(stage, queries=q)))(queries)
    real_parts = np.linalg.eigvals(np.asarray(blocks)).real.min((0, -1))
    assert (real_parts >= 1 - rho).all()
    assert (rho[2:] > 0).all()
    assert (1 - real_parts[2:]).max() > 0.1 * rho.max()  # the queries come near enough to matter


def test_normalised_queries_are_refused():
    options = real.OPTIONS["query_norm"]
    n = real.numbers(options)
    with pytest.raises(ValueError, match="depend on tokens"):
        pa.certificate(real.layer(options, n).stage(n["x"]))
