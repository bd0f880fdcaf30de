"""The keyword `bound` of every public function: bounded contexts, against the slow oracle."""

import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probattn as pa
from probattn import _reference as reference
from probattn.blocks.geometry import bounded
from tests.support.cases import BY_NAME, LONG_CASE, SINGULAR_POSITION, THIN, Case, make

pytestmark = pytest.mark.usefixtures("strict_promotion")

DELTA = 0.5  # of the barrier: the oracle's parabola ends at a determinant of -10 delta
KINDS = ["sigma_min", "reduced", "det", "log_det"]
SMALL, MIDDLE, LARGE = 0.3, 1.5, 40.0  # beside embeddings of norm 2 or so
NAMES = [
    "length_1",
    "scalar_attractive",
    "thin",
    "thin_repeated_tokens",
    "square_folded",
    "square_scale_30",
]
cases = pytest.mark.parametrize("case", [BY_NAME[name] for name in NAMES], ids=str)
bounds = pytest.mark.parametrize("bound", [SMALL, MIDDLE, LARGE])


def margin(kind):
    return functools.partial(pa.stability_margin, kind=kind)


PUBLIC = {
    "conditional_mean": pa.conditional_mean,
    "residual": pa.residual,
    "reduced_blocks": pa.reduced_blocks,
    "jacobian_blocks": pa.jacobian_blocks,
    "log_det": lambda *inputs, bound=None: jnp.stack(pa.log_det(*inputs, bound=bound), -1),
    "relaxed_barrier": functools.partial(pa.relaxed_barrier, delta=DELTA),
    **{f"margin_{kind}": margin(kind) for kind in KINDS},
    "embedding_margin": pa.embedding_margin,
    "infeasible": pa.infeasible,
    "certificate": pa.certificate,
}
COMPILED = {name: jax.jit(function) for name, function in PUBLIC.items()}
every_function = pytest.mark.parametrize("name", PUBLIC)


def real_eigenvalue_at_most_zero(blocks):
    eigenvalues = np.linalg.eigvals(np.asarray(blocks))
    return np.any((np.abs(eigenvalues.imag) < 1e-12) & (eigenvalues.real <= 0), axis=-1)


ORACLE = {
    "conditional_mean": lambda x, *others: x - reference.residual(x, *others),
    "residual": reference.residual,
    "reduced_blocks": reference.reduced_blocks,
    "jacobian_blocks": reference.jacobian_blocks,
    "log_det": lambda *inputs: jnp.stack(reference.log_det(*inputs), -1),
    "relaxed_barrier": lambda *inputs: reference.relaxed_barrier(*inputs[:3], DELTA, inputs[3]),
    **{
        f"margin_{kind}": lambda *inputs, kind=kind: reference.stability_margin(
            *inputs[:3], kind, inputs[3]
        )
        for kind in KINDS
    },
    "embedding_margin": reference.embedding_margin,
    "infeasible": lambda *inputs: real_eigenvalue_at_most_zero(reference.jacobian_blocks(*inputs)),
    "certificate": reference.certificate,
}


def inputs_of(name):
    return tuple(map(jnp.asarray, make(BY_NAME[name])))


def comparable(name, result):
    """An embedding margin by its inverse, which is finite where nothing moves the margin."""
    return 1 / np.asarray(result) if name == "embedding_margin" else np.asarray(result)


# ---- phi --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [1e-3, 1.0, 1e3])
def test_bounded_vectors_keep_their_direction_and_stay_within_the_bound(bound):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 60, 5)) * np.logspace(-6, 6, 60)[:, None]
    y = np.asarray(bounded(x, bound))
    length, before = np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(y / length[..., None], x / before[..., None], rtol=1e-13)
    # 1/|y|^2 = 1/|x|^2 + 1/c^2; beyond 1e7 bounds the two norms agree to the last digits.
    np.testing.assert_allclose(length**-2, before**-2 + bound**-2, rtol=1e-13)
    assert np.all(length <= bound * (1 + 4 * np.finfo(np.float64).eps))
    assert np.all(length[before < 1e6 * bound] < bound)


def test_origin_stays_and_has_the_derivative_of_the_identity():
    np.testing.assert_array_equal(bounded(np.zeros(3), 0.7), np.zeros(3))
    np.testing.assert_allclose(jax.jacfwd(bounded)(jnp.zeros(3), 0.7), np.eye(3))
    np.testing.assert_allclose(jax.jacrev(bounded)(jnp.zeros(3), 0.7), np.eye(3))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_token_at_any_distance_has_a_value_at_the_bound(dtype):
    far = np.array([[1e-3 * np.finfo(dtype).max, 0.0], [1e25, 0.0]], dtype)
    np.testing.assert_allclose(bounded(far, 0.7), [[0.7, 0], [0.7, 0]], rtol=1e-6)


def test_no_bound_changes_nothing():
    x = make(BY_NAME["thin"])[0]
    np.testing.assert_array_equal(bounded(x, None), x)


# ---- every function ---------------------------------------------------------------------------


@bounds
@cases
@every_function
def test_function_matches_oracle(name, case, bound):
    inputs = tuple(map(jnp.asarray, make(case)))
    got = comparable(name, COMPILED[name](*inputs, bound=bound))
    true = comparable(name, ORACLE[name](*inputs, bound))
    np.testing.assert_allclose(got, true, rtol=1e-9, atol=1e-10)


def test_long_sequence_matches_dense_jacobian():
    """Longer than the blocks of rows that the covariances are formed in."""
    inputs = tuple(map(jnp.asarray, make(LONG_CASE)))
    sign, log_abs = pa.log_det(*inputs, bound=MIDDLE)
    for t in (63, 64, 99):
        true_sign, true_log_abs = reference.log_det_at(*inputs, t, MIDDLE)
        assert sign[t] == true_sign
        np.testing.assert_allclose(log_abs[t], true_log_abs, rtol=0, atol=1e-12)


@bounds
@pytest.mark.parametrize("name", ["thin", "square_folded", "wide"])
def test_sum_over_positions_is_log_det_of_whole_jacobian(name, bound):
    """Of the full T d x T d matrix, which no formula of the package enters."""
    inputs = inputs_of(name)
    sign, log_abs = pa.log_det(*inputs, bound=bound)
    true_sign, true_log_abs = reference.log_det_total(*inputs, bound)
    assert np.prod(sign) == true_sign
    np.testing.assert_allclose(log_abs.sum(), true_log_abs, rtol=0, atol=1e-11)


def test_small_bound_unfolds_what_a_large_one_leaves_folded():
    inputs, t = inputs_of("square_folded"), SINGULAR_POSITION
    folded = {bound: float(pa.log_det(*inputs, bound=bound)[0][t]) for bound in (SMALL, LARGE)}
    assert folded == {SMALL: 1.0, LARGE: -1.0}
    assert not pa.infeasible(*inputs, bound=SMALL)[t]
    assert pa.infeasible(*inputs, bound=LARGE)[t]


@every_function
def test_large_bound_approaches_none_like_its_inverse_square(name):
    inputs = inputs_of("thin")
    unbounded = comparable(name, COMPILED[name](*inputs)).astype(float)

    def difference(bound):
        return comparable(name, COMPILED[name](*inputs, bound=bound)).astype(float) - unbounded

    np.testing.assert_allclose(difference(1e9), 0, atol=1e-13)
    near, far = difference(1e3), difference(2e3)
    np.testing.assert_allclose(near, 4 * far, atol=1e-9)
    if name != "infeasible":
        assert np.abs(near).max() > 1e-8


@hypothesis.given(st.integers(0, 2**32 - 1), st.floats(-3, 3), st.floats(-1, 1))
@hypothesis.settings(max_examples=10)
@every_function
def test_bound_is_in_the_unit_of_the_embeddings(name, seed, log_unit, log_bound):
    """Embeddings and bound in another unit, with the same coupling: only lengths change."""
    x, w_query, w_key = make(Case("", *THIN, seed=seed))
    unit, bound = 10.0**log_unit, 10.0**log_bound
    before = comparable(name, COMPILED[name](x, w_query, w_key, bound=bound))
    after = comparable(
        name, COMPILED[name](unit * x, w_query / unit, w_key / unit, bound=unit * bound)
    )
    factor = {"residual": unit, "conditional_mean": unit, "embedding_margin": 1 / unit}.get(name, 1)
    np.testing.assert_allclose(after, factor * before, rtol=1e-7, atol=1e-9 * factor)


@every_function
@pytest.mark.parametrize("bound", [2, np.float64(2), np.float32(2)], ids=repr)
def test_bound_does_not_change_the_dtype(name, bound):
    inputs = make(BY_NAME["thin"], np.float32)
    got = PUBLIC[name](*inputs, bound=bound)
    assert got.dtype == (bool if name == "infeasible" else np.float32)
    exact = COMPILED[name](*(array.astype(np.float64) for array in inputs), bound=2.0)
    np.testing.assert_allclose(comparable(name, got), comparable(name, exact), rtol=1e-4, atol=1e-5)


@every_function
def test_bounds_of_their_own_by_vmap(name):
    """Traced, and one for each head."""
    x, w_query, w_key = inputs_of("thin")
    heads = jnp.stack([w_query, 2 * w_query]), jnp.stack([w_key, w_key])
    own = jnp.array([SMALL, MIDDLE])

    def one(w_query, w_key, bound):
        return PUBLIC[name](x, w_query, w_key, bound=bound)

    together = jax.vmap(one)(*heads, own)
    for head in range(2):
        apart = COMPILED[name](x, heads[0][head], heads[1][head], bound=float(own[head]))
        np.testing.assert_allclose(together[head], apart, rtol=1e-9, atol=1e-12)


@every_function
@pytest.mark.parametrize("bound", [SMALL, LARGE])
def test_future_tokens_change_nothing_in_the_past(name, bound):
    x, w_query, w_key = inputs_of("thin")
    before = COMPILED[name](x, w_query, w_key, bound=bound)
    after = COMPILED[name](x.at[3:].multiply(-50.0), w_query, w_key, bound=bound)
    np.testing.assert_array_equal(before[:3], after[:3])


# ---- derivatives ------------------------------------------------------------------------------


@jax.jit
def log_det_derivative(x, w_query, w_key, bound):
    """One (T, ...) array for each input."""

    def log_abs(x, w_query, w_key, bound):
        return pa.log_det(x, w_query, w_key, bound=bound)[1]

    return jax.jacrev(log_abs, argnums=(0, 1, 2, 3))(x, w_query, w_key, bound)


@bounds
@pytest.mark.parametrize("name", ["thin_repeated_tokens", "square_folded"])
def test_log_det_derivative_matches_dense_jacobian(name, bound):
    """With respect to the embeddings, the matrices and the bound itself."""
    inputs = (*inputs_of(name), jnp.asarray(bound))

    def total_of(t):
        return jax.grad(
            lambda *inputs: reference.log_det_at(*inputs[:3], t, inputs[3])[1], range(4)
        )

    got = log_det_derivative(*inputs)
    for t in range(1, len(inputs[0])):
        for one, other in zip(got, total_of(t)(*inputs), strict=True):
            np.testing.assert_allclose(one[t], other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", [n for n in PUBLIC if n not in ("embedding_margin", "infeasible")])
def test_derivative_in_the_bound_matches_finite_differences(name):
    """In forward and reverse mode, from the values alone."""
    inputs = inputs_of("thin")

    def function(bound):
        return COMPILED[name](*inputs, bound=bound)

    bound, step = jnp.asarray(MIDDLE), 1e-5
    slope = (np.asarray(function(bound + step)) - np.asarray(function(bound - step))) / (2 * step)
    assert np.abs(slope).max() > 1e-3
    np.testing.assert_allclose(jax.jacrev(function)(bound), slope, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(jax.jacfwd(function)(bound), slope, rtol=1e-7, atol=1e-8)


def test_derivative_is_finite_at_tokens_far_beyond_the_bound_and_at_the_origin():
    x, w_query, w_key = inputs_of("thin")
    x = x.at[0].set(0.0).at[1].multiply(1e8)
    assert all(np.all(np.isfinite(part)) for part in log_det_derivative(x, w_query, w_key, SMALL))


# ---- what is refused --------------------------------------------------------------------------


def refuses(function, bound, quoted):
    """One line that quotes what was given and says what was expected."""
    with pytest.raises(ValueError, match="bound") as error:
        function(bound)
    message = str(error.value).splitlines()[0]  # JAX adds lines of its own under jit
    assert quoted in message
    assert re.search("expected.*number > 0", message)


BAD_BOUNDS = [
    (0, "0"),
    (0.0, "0.0"),
    (-1, "-1"),
    (np.nan, "nan"),
    (np.inf, "inf"),
    (-np.inf, "-inf"),
    (np.ones(2), "(2,)"),
    (np.ones(1), "(1,)"),
]
EVERYTHING = {
    **PUBLIC,
    "is_proper": lambda x, *weights, bound: pa.is_proper(*weights, bound=bound),
    "bounded": lambda x, *weights, bound: bounded(x, bound),
}


@pytest.mark.parametrize(("bound", "quoted"), BAD_BOUNDS, ids=str)
@pytest.mark.parametrize("name", EVERYTHING)
def test_bad_bound_says_given_and_expected(name, bound, quoted):
    inputs = make(BY_NAME["thin"])
    refuses(lambda bound: EVERYTHING[name](*inputs, bound=bound), bound, quoted)


@pytest.mark.parametrize("name", EVERYTHING)
def test_traced_bound_of_wrong_shape_is_refused(name):
    inputs = make(BY_NAME["thin"])
    function = jax.jit(lambda bound: EVERYTHING[name](*inputs, bound=bound))
    refuses(function, np.ones(2), "(2,)")


def test_bad_bound_is_refused_while_everything_else_is_traced():
    inputs = make(BY_NAME["thin"])
    with pytest.raises(ValueError, match=r"bound is -1\.0: expected"):
        jax.jit(lambda *inputs: pa.log_det(*inputs, bound=-1.0))(*inputs)
