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
from tests.support.cases import (
    BY_NAME,
    LONG_CASE,
    SINGULAR_POSITION,
    THIN,
    Case,
    make,
    of_shape,
    shapes,
    stacked,
)
from tests.support.dense import (
    dense,
    flat,
    last_block,
    log_abs_slopes,
    margin_slopes,
    quick_jit,
    real_eigenvalue_at_most_zero,
    reduced_blocks,
    signed_sigma_min,
    whole_jacobian,
)

pytestmark = pytest.mark.usefixtures("strict_promotion")

DELTA = 0.5  # of the barrier: the oracle's parabola ends at a determinant of -10 delta
KINDS = ["sigma_min", "reduced", "det", "log_det"]
SMALL, MIDDLE, LARGE = 0.3, 1.5, 40.0  # beside embeddings of norm 2 or so
BOUNDS = (SMALL, MIDDLE, LARGE)
# All functions make one large program for each shape.
every_shape = shapes("one_token", "two_tokens", "scalar", "square", "wide", "rank_one")


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
    "margin_lower_bound": pa.margin_lower_bound,
}
EXACT = (
    "embedding_margin",
    "infeasible",
    "margin_lower_bound",
)  # which have no derivative, or none that is exact


def everything(x, w_query, w_key, bound):
    return {name: function(x, w_query, w_key, bound=bound) for name, function in PUBLIC.items()}


compiled = quick_jit(jax.vmap(everything))


def oracle(case, bound):
    """What every function has to return for a case."""
    inputs, found = make(case), dense(case, bound=bound)
    determinants = np.linalg.det(found.blocks)
    sign, log_abs = np.linalg.slogdet(found.blocks)
    margin = signed_sigma_min(found.blocks)
    by_x = margin_slopes(found)[0].reshape(case.length, -1)
    barrier = reference.relaxed_logarithm(jnp.asarray(determinants), DELTA)
    with np.errstate(divide="ignore"):
        return {
            "conditional_mean": inputs[0] - found.residual,
            "residual": found.residual,
            "reduced_blocks": reduced_blocks(*inputs, bound),
            "jacobian_blocks": found.blocks,
            "log_det": np.stack([sign, log_abs], -1),
            # The oracle's parabola ends there.
            "relaxed_barrier": np.where(determinants > -10 * DELTA, barrier, np.nan),
            "margin_sigma_min": margin,
            "margin_reduced": signed_sigma_min(reduced_blocks(*inputs, bound)),
            "margin_det": determinants,
            "margin_log_det": np.where(sign > 0, log_abs, -np.inf),
            "embedding_margin": np.abs(margin) / np.linalg.norm(by_x, axis=1),
            "infeasible": real_eigenvalue_at_most_zero(found.blocks),
            "certificate": reference.certificate(*inputs, bound),
            "margin_lower_bound": reference.margin_lower_bound(*inputs, bound),
        }


def comparable(name, result):
    """An embedding margin by its inverse, which is finite where nothing moves the margin."""
    return 1 / np.asarray(result) if name == "embedding_margin" else np.asarray(result)


@functools.cache
def computed(shape):
    """Results of all cases of a shape with all bounds: a dictionary from (case, bound)."""
    pairs = [(case, bound) for case in regular_cases(shape) for bound in BOUNDS]
    inputs = stacked([case for case, _ in pairs])
    found = jax.tree.map(np.asarray, compiled(*inputs, np.array([bound for _, bound in pairs])))
    return {
        pair: {name: part[number] for name, part in found.items()}
        for number, pair in enumerate(pairs)
    }


def regular_cases(shape):
    return [
        case
        for case in of_shape(shape)
        if case.kind not in ("singular", "twice_singular", "offset", "key_offset", "one_hot")
    ]


def of_thin(*many):
    """Results of several (x, w_query, w_key, bound), by the program of `computed`."""
    count = len(BOUNDS) * len(regular_cases(THIN))
    padded = [*many, *[many[0]] * (count - len(many))]
    found = compiled(*(np.stack(part) for part in zip(*padded, strict=True)))
    found = jax.tree.map(np.asarray, found)
    return [{name: part[number] for name, part in found.items()} for number in range(len(many))]


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


@pytest.mark.slow
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


@every_shape
def test_function_matches_oracle(shape):
    for (case, bound), found in computed(shape).items():
        for name, true in oracle(case, bound).items():
            got, true = comparable(name, found[name]), comparable(name, true)
            assert got.shape == true.shape, (name, case)
            if name == "relaxed_barrier":
                got = np.where(np.isnan(true), true, got)
            if name == "embedding_margin" and case.kind == "all_equal":
                continue  # the smallest singular value is not simple
            # Rounding adds to the certificate, most where the tokens are large.
            atol = 1e-9 if name == "certificate" else 1e-10
            np.testing.assert_allclose(
                got, true, rtol=1e-9, atol=atol, err_msg=f"{name}, {case}, bound {bound}"
            )


@pytest.mark.slow
def test_long_sequence_matches_dense_jacobian():
    """Longer than the blocks of rows that the covariances are formed in."""
    inputs = make(LONG_CASE)
    sign, log_abs = quick_jit(functools.partial(pa.log_det, bound=MIDDLE))(*inputs)
    for t in (63, 64, 99):
        past = inputs[0][: t + 1], *inputs[1:]
        true_sign, true_log_abs = np.linalg.slogdet(last_block(*past, MIDDLE))
        assert sign[t] == true_sign
        np.testing.assert_allclose(log_abs[t], true_log_abs, rtol=0, atol=1e-12)


@every_shape
def test_sum_over_positions_is_log_det_of_whole_jacobian(shape):
    """Of the full T d x T d matrix, which no formula of the package enters."""
    for (case, bound), found in computed(shape).items():
        true_sign, true_log_abs = np.linalg.slogdet(whole_jacobian(*make(case), bound))
        assert np.prod(found["log_det"][:, 0]) == true_sign, (case, bound)
        total = found["log_det"][:, 1].sum()
        np.testing.assert_allclose(
            total, true_log_abs, rtol=0, atol=1e-11, err_msg=f"{case}, {bound}"
        )


def test_small_bound_unfolds_what_a_large_one_leaves_folded():
    case, t = BY_NAME["thin_folded"], SINGULAR_POSITION
    small, large = (computed(THIN)[case, bound] for bound in (SMALL, LARGE))
    assert (small["log_det"][t, 0], large["log_det"][t, 0]) == (1, -1)
    assert (small["infeasible"][t], large["infeasible"][t]) == (False, True)


@pytest.mark.slow
def test_large_bound_approaches_none_like_its_inverse_square():
    inputs = make(BY_NAME["thin"])
    unbounded = quick_jit(lambda *inputs: everything(*inputs, None))(*inputs)
    nearest, near, far = of_thin(*((*inputs, bound) for bound in (1e9, 1e3, 2e3)))
    for name in PUBLIC:
        limit, *differences = (
            comparable(name, found[name]).astype(float)
            - comparable(name, unbounded[name]).astype(float)
            for found in (nearest, near, far)
        )
        # What is proved has rounding taken into account, that of phi too.
        atol = 1e-12 if name in ("certificate", "margin_lower_bound") else 1e-13
        np.testing.assert_allclose(limit, 0, atol=atol, err_msg=name)
        np.testing.assert_allclose(differences[0], 4 * differences[1], atol=1e-9, err_msg=name)
        if name != "infeasible":
            assert np.abs(differences[0]).max() > 1e-8, name


@hypothesis.given(st.integers(0, 2**32 - 1), st.floats(-3, 3), st.floats(-1, 1))
def test_bound_is_in_the_unit_of_the_embeddings(seed, log_unit, log_bound):
    """Embeddings and bound in another unit, with the same coupling: only lengths change."""
    x, w_query, w_key = make(Case("", *THIN, seed=seed))
    unit, bound = 10.0**log_unit, 10.0**log_bound
    before, after = of_thin(
        (x, w_query, w_key, bound), (unit * x, w_query / unit, w_key / unit, unit * bound)
    )
    factors = {"residual": unit, "conditional_mean": unit, "embedding_margin": 1 / unit}
    for name in PUBLIC:
        factor = factors.get(name, 1)
        np.testing.assert_allclose(
            comparable(name, after[name]),
            factor * comparable(name, before[name]),
            rtol=1e-7,
            atol=1e-9 * factor,
            err_msg=name,
        )


@pytest.mark.slow
def test_bound_does_not_change_the_dtype():
    inputs = make(BY_NAME["thin"], np.float32)
    for bound in (2, np.float64(2), np.float32(2)):
        outlines = jax.eval_shape(lambda *inputs, bound=bound: everything(*inputs, bound), *inputs)
        for name, outline in outlines.items():
            expected = bool if name == "infeasible" else np.float32
            assert outline.dtype == expected, (name, bound)
    got = quick_jit(lambda *inputs: everything(*inputs, 2))(*inputs)
    [exact] = of_thin((*(array.astype(np.float64) for array in inputs), 2.0))
    raised = np.asarray(got["certificate"]) - np.asarray(exact["certificate"])
    assert np.all((raised >= 0) & (raised < 5e-4))  # rounding adds to it, and never takes from it
    for name in set(PUBLIC) - {"certificate"}:
        np.testing.assert_allclose(
            comparable(name, got[name]),
            comparable(name, exact[name]),
            rtol=1e-4,
            atol=1e-5,
            err_msg=name,
        )


@pytest.mark.parametrize("bound", [SMALL, LARGE])
def test_future_tokens_change_nothing_in_the_past(bound):
    x, *weights = make(BY_NAME["thin"])
    changed = x.copy()
    changed[3:] *= -50.0
    before, after = of_thin((x, *weights, bound), (changed, *weights, bound))
    for name in PUBLIC:
        np.testing.assert_array_equal(before[name][:3], after[name][:3], err_msg=name)


# ---- derivatives ------------------------------------------------------------------------------


@quick_jit
@jax.vmap
def log_det_derivative(x, w_query, w_key, bound):
    """One (T, ...) array for each input."""

    def log_abs(x, w_query, w_key, bound):
        return pa.log_det(x, w_query, w_key, bound=bound)[1]

    return jax.jacrev(log_abs, argnums=(0, 1, 2, 3))(x, w_query, w_key, bound)


@every_shape
def test_log_det_derivative_matches_dense_jacobian(shape):
    """With respect to the embeddings, the matrices and the bound itself; and far away."""
    pairs = [(case, bound) for case in regular_cases(shape) for bound in BOUNDS]
    x, *weights = stacked([case for case, _ in pairs])
    bounds = np.array([bound for _, bound in pairs])
    got = jax.tree.map(np.asarray, log_det_derivative(x, *weights, bounds))
    for number, (case, bound) in enumerate(pairs):
        found = dense(case, bound=bound)
        true = flat(log_abs_slopes(found))
        # In proportion to the condition, at blocks near the boundary.
        smallest = np.linalg.svd(found.blocks, compute_uv=False)[:, -1]
        rtol = np.maximum(1e-9, 16 * np.finfo(np.float64).eps / smallest)[:, None]
        error = np.abs(flat([part[number] for part in got]) - true)
        assert np.all(error <= 1e-10 + rtol * np.abs(true).max(1)[:, None]), (case, bound)
    far = x.copy()
    far[:, 0] = 0.0
    far[:, 1:2] *= 1e8
    slopes = log_det_derivative(far, *weights, np.full_like(bounds, SMALL))
    assert all(np.all(np.isfinite(part)) for part in slopes)


@pytest.mark.slow
def test_derivative_in_the_bound_matches_finite_differences():
    """In forward and reverse mode, from the values alone."""
    inputs = make(BY_NAME["thin"])
    step = 1e-5
    above, below = of_thin((*inputs, MIDDLE + step), (*inputs, MIDDLE - step))
    towards = {
        name: np.random.default_rng(0).standard_normal(part.shape)
        for name, part in above.items()
        if name not in EXACT
    }

    def moved(bound):
        found = everything(*inputs, bound)
        return {name: found[name] for name in towards}

    @quick_jit
    def both_modes(bound):
        forward = jax.jvp(moved, (bound,), (jnp.ones_like(bound),))[1]
        pull = jax.vjp(moved, bound)[1]
        none = {name: jnp.zeros_like(part) for name, part in towards.items()}
        reverse = {name: pull(none | {name: jnp.asarray(towards[name])})[0] for name in towards}
        return forward, reverse

    forward, reverse = both_modes(jnp.asarray(MIDDLE))
    for name in towards:
        slope = (above[name] - below[name]) / (2 * step)
        assert np.abs(slope).max() > 1e-3, name
        np.testing.assert_allclose(forward[name], slope, rtol=1e-7, atol=1e-8, err_msg=name)
        np.testing.assert_allclose(
            reverse[name], np.vdot(towards[name], forward[name]), rtol=1e-9, err_msg=name
        )


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


@pytest.mark.parametrize("name", EVERYTHING)
def test_bad_bound_says_given_and_expected(name):
    inputs = make(BY_NAME["thin"])
    for bad, quoted in BAD_BOUNDS:
        refuses(lambda bound: EVERYTHING[name](*inputs, bound=bound), bad, quoted)
    # Under jit its shape is known.
    function = jax.jit(lambda bound: EVERYTHING[name](*inputs, bound=bound))
    refuses(function, np.ones(2), "(2,)")


def test_bad_bound_is_refused_while_everything_else_is_traced():
    inputs = make(BY_NAME["thin"])
    with pytest.raises(ValueError, match=r"bound is -1\.0: expected"):
        jax.jit(lambda *inputs: pa.log_det(*inputs, bound=-1.0))(*inputs)
