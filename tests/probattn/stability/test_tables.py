"""The certificate of a table: no context of its tokens folds below it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probattn import certificate, coupling, infeasible, table_certificate
from probattn.stability import tables as tables_module

ROWS, WIDTH, RANK = 7, 3, 2


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(name="given", scope="module")
def given_fixture():
    """A table, and matrices of three heads, mixed, attractive and repulsive."""
    w_query = random(1, 3, WIDTH, RANK)
    w_key = jnp.array([0.3, 1.0, -1.0])[:, None, None] * w_query + 0.3 * random(2, 3, WIDTH, RANK)
    return random(0, ROWS, WIDTH), w_query, w_key


def test_it_is_the_largest_certificate_of_pairs_or_larger_in_no_other_norm(given):
    table, w_query, w_key = given
    found = table_certificate(table, w_query, w_key)
    pairs = jnp.stack([table[jnp.array(pair)] for pair in itertools.combinations(range(ROWS), 2)])
    contexts = jnp.concatenate([pairs, pairs[:, :1]], axis=1)[:, None]
    largest = certificate(contexts, w_query, w_key)[..., 2].max(0)
    whole = certificate(jnp.concatenate([table, table[:1]])[None], w_query, w_key)[:, -1]
    # A pair may be best in another norm than the table is: it is between the two.
    assert np.all(largest <= found.rho * (1 + 1e-6))
    np.testing.assert_allclose(found.rho, whole, rtol=1e-5)


def test_the_pair_folds_exactly_where_its_number_is_above_one(given):
    table, w_query, w_key = given
    found = table_certificate(table, w_query, w_key)
    matrices = np.asarray(coupling(w_query, w_key), float)
    differences = np.asarray(table, float)[:, None] - np.asarray(table, float)
    products = np.einsum("abi,hij,abj->hab", differences, matrices, differences) / 4
    products[:, range(ROWS), range(ROWS)] = -np.inf
    np.testing.assert_allclose(found.pair_rho, products.max((1, 2)), rtol=1e-5)
    for head, (first, second) in enumerate(np.asarray(found.pair)):
        np.testing.assert_allclose(products[head, first, second], found.pair_rho[head], rtol=1e-5)
        # With the query zero both have the same weight.
        pair = table[jnp.array([first, second])]
        for target in (0.99, 1.01) if found.pair_rho[head] > 0 else ():
            scale = jnp.sqrt(target / found.pair_rho[head])
            context = scale * (pair - pair.mean(0))
            x = jnp.concatenate([context, jnp.zeros((1, WIDTH))])
            assert infeasible(x, w_query[head], w_key[head])[-1] == (target > 1)


def test_rows_of_one_position_never_meet(given):
    table, w_query, w_key = given
    position = jnp.array([0, 1, 0, 1, 0, 1, 0])
    found = table_certificate(table, w_query, w_key, position=position)
    apart = [
        table_certificate(table[jnp.array(pair)], w_query, w_key)
        for pair in itertools.combinations(range(ROWS), 2)
        if position[pair[0]] != position[pair[1]]
    ]
    np.testing.assert_allclose(
        found.pair_rho, jnp.stack([each.pair_rho for each in apart]).max(0), rtol=1e-5
    )
    assert np.all(position[found.pair[:, 0]] != position[found.pair[:, 1]])
    alone = table_certificate(table, w_query, w_key, position=jnp.zeros(ROWS, int))
    np.testing.assert_allclose(alone.pair_rho, 0.0)


def test_groups_bound_the_table_from_above(given, monkeypatch):
    table, w_query, w_key = given
    exact = table_certificate(table, w_query, w_key)
    monkeypatch.setattr(tables_module, "MOST_ROWS", 3)
    tables_module._certify.clear_cache()
    grouped = table_certificate(table, w_query, w_key)
    # Rows that are alike lose nothing but rounding.
    alike = table_certificate(jnp.repeat(table[:3], 2, axis=0), w_query, w_key)
    tables_module._certify.clear_cache()
    assert np.all(grouped.rho >= exact.rho)
    assert np.all(np.isnan(grouped.pair_rho))
    assert np.all(grouped.pair < ROWS)  # the last group is not whole
    np.testing.assert_allclose(
        alike.rho, table_certificate(table[:3], w_query, w_key).rho, rtol=1e-5
    )


def test_the_farthest_pair_is_found_in_whatever_tiles_its_rows_lie(given, monkeypatch):
    """Also where the rows are no whole number of tiles."""
    table, w_query, _ = given
    table = 1e-3 * np.asarray(table)
    matrix = w_query[0]  # in both roles: A is positive semidefinite
    axis = np.linalg.svd(matrix)[0][:, 0]
    monkeypatch.setattr(tables_module, "_TILE", 3)
    tables_module._certify.clear_cache()
    for pair in itertools.combinations(range(ROWS), 2):
        moved = table.copy()
        moved[list(pair)] = axis, -axis
        found = table_certificate(moved, matrix, matrix)
        assert sorted(found.pair.tolist()) == list(pair)
        np.testing.assert_allclose(found.rho, found.pair_rho, rtol=1e-2)
    tables_module._certify.clear_cache()


def test_a_bound_and_a_vanishing_coupling(given):
    table, w_query, w_key = given
    far = table_certificate(1e6 * table, w_query, w_key, bound=0.5)
    norms = jnp.linalg.norm(coupling(w_query, w_key), ord=2, axis=(-2, -1))
    assert np.all(far.rho <= 0.25 * norms * (1 + 1e-4))
    none = table_certificate(table, jnp.zeros_like(w_query), w_key)
    np.testing.assert_allclose(none.rho, 0.0, atol=1e-6)


@pytest.mark.parametrize(
    ("table", "position", "message"),
    [
        (jnp.ones((2, 4)), None, r"table has shape \(2, 4\): expected \(N, d\)"),
        (jnp.ones((0, WIDTH)), None, r"table has shape \(0, 3\): expected \(N, d\) with N >= 1"),
        (jnp.ones(WIDTH), None, r"table has shape \(3,\): expected"),
        (jnp.ones((2, WIDTH)), jnp.zeros(3, int), r"position has shape \(3,\)"),
        (jnp.ones((2, WIDTH)), jnp.zeros(2), "dtype float.*: expected integers"),
    ],
)
def test_bad_input(given, table, position, message):
    with pytest.raises(ValueError, match=message):
        table_certificate(table, *given[1:], position=position)
