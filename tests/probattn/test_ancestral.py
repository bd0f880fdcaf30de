"""The inverse of the residual map: solved to rounding, or reported; its implicit derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.test_util import check_grads

from probattn.ancestral import solve_residual
from tests.support import dense
from tests.support.dense import quick_jit

pytestmark = pytest.mark.usefixtures("strict_promotion")

SHAPE, SCALAR, WIDE = (6, 3, 2), (6, 1, 1), (6, 2, 4)
regimes = pytest.mark.parametrize("regime", ["repulsive", "bounded"])

SLOW = pytest.mark.slow
solve = quick_jit(solve_residual)


def draws(regime, count=(), *, shape=SHAPE, strength=(1.0, 1.0), seed=0):
    """Residuals and weights of a proper regime, and the bound, a different coupling in each draw.

    Args:
        regime: "repulsive" has W_K = -W_Q, and queries of norm sqrt(strength) for unit tokens.
            "bounded" has a positive coupling of c^2 ||A|| = 0.95 at c = 2 for strength 1.
        count: leading axes of all three arrays.
        shape: T, d and r.
        strength: least and greatest; drawn between them on a logarithmic scale.
        seed: of NumPy's generator.
    """
    rng = np.random.default_rng(seed)
    length, width, rank = shape
    e = rng.standard_normal((*count, length, width))
    w_query = rng.standard_normal((*count, width, rank)) / np.sqrt(width)
    strengths = np.exp(rng.uniform(*np.log(strength), (*count, 1, 1)))
    if regime == "repulsive":
        w_query = w_query * np.sqrt(strengths)
        return e, w_query, -w_query, None
    w_key = w_query + 0.3 * rng.standard_normal(w_query.shape) / np.sqrt(width)
    bound = 2.0
    a = w_key @ np.swapaxes(w_query, -1, -2) / np.sqrt(rank)
    size = np.linalg.norm(a, ord=2, axis=(-2, -1))[..., None, None]
    return e, w_query * 0.95 * strengths / (size * bound**2), w_key, bound


def true_residual(x, *others):
    return dense.residual(np.asarray(x), *others)


# As many as the processes of training have, or so few that it takes no time.
counts = pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=SLOW)])


@counts
@pytest.mark.parametrize(
    ("regime", "strength"),
    [
        pytest.param("repulsive", (0.1, 10.0), marks=SLOW),
        ("repulsive", (100.0, 1000.0)),
        ("bounded", (0.1, 1.0)),
    ],
    ids=["repulsive", "sharp", "bounded"],
)
def test_residuals_of_many_sequences_are_recovered(regime, strength, count):
    e, w_query, w_key, bound = draws(regime, (count,), strength=strength)
    solution = solve(e, w_query, w_key, bound=bound)
    assert solution.x.dtype == np.float64
    assert solution.unconverged == 0
    recovered = true_residual(solution.x, w_query, w_key, bound)
    np.testing.assert_allclose(recovered, e, rtol=0, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("norm", [*(pytest.param(n, marks=SLOW) for n in (5.0, 10.0)), 20.0])
def test_antisymmetric_couplings_are_solved(norm):
    """Proper at any norm, but the way to the solution winds: many short steps in a row."""
    e = np.random.default_rng(0).standard_normal((1000, 20, 2))
    w_query, w_key = np.eye(2), norm * np.sqrt(2) * np.array([[0.0, 1.0], [-1.0, 0.0]])
    assert solve(e, w_query, w_key).unconverged == 0


@pytest.mark.slow
@counts
@regimes
def test_float32_residuals_are_recovered(regime, count):
    """To 1e-5: some 20 roundings of tokens that reach 6."""
    e, w_query, w_key, bound = draws(regime, (count,), strength=(0.1, 1.0))
    e, w_query, w_key = (array.astype(np.float32) for array in (e, w_query, w_key))
    solution = solve(e, w_query, w_key, bound=bound)
    assert solution.x.dtype == np.float32
    assert solution.unconverged == 0
    exact = (np.asarray(array, np.float64) for array in (solution.x, w_query, w_key))
    np.testing.assert_allclose(true_residual(*exact, bound), e, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("regime", "shape"),
    [
        pytest.param("repulsive", SCALAR, id="repulsive_scalar"),
        pytest.param("bounded", WIDE, id="bounded_rank_above_width"),
        pytest.param("bounded", SCALAR, id="bounded_scalar", marks=SLOW),
        pytest.param("repulsive", WIDE, id="repulsive_rank_above_width", marks=SLOW),
    ],
)
def test_other_shapes_are_recovered(regime, shape):
    e, w_query, w_key, bound = draws(regime, (100,), shape=shape, strength=(0.3, 1.0))
    solution = solve(e, w_query, w_key, bound=bound)
    assert solution.unconverged == 0
    recovered = true_residual(solution.x, w_query, w_key, bound)
    np.testing.assert_allclose(recovered, e, rtol=0, atol=1e-12)


def last_residual(token, past, *others):
    return dense.residual(np.array([*past, token]), *others)[-1]


def solve_by_brentq(e, w_query, w_key, bound):
    """x_t - mu_t(x_t) = e_t in one dimension: mu_t lies within the range of the past."""
    x = []
    for noise in e[:, 0]:
        past = [np.array([token]) for token in x]
        reach = 1 + max(np.abs(x), default=0.0)

        def equation(token, past=past, noise=noise):
            found = last_residual(np.array([token]), past, w_query, w_key, bound)
            return float(found[0]) - noise

        x.append(scipy.optimize.brentq(equation, noise - reach, noise + reach, xtol=1e-13))
    return np.array(x)[:, None]


def solve_by_root(e, w_query, w_key, bound):
    """MINPACK's hybrid method, which is given no derivative."""
    x = []
    for noise in e:

        def equation(token, past=tuple(x), noise=noise):
            return last_residual(token, past, w_query, w_key, bound) - noise

        x.append(scipy.optimize.root(equation, noise, tol=1e-13).x)
    return np.array(x)


@pytest.mark.slow
@regimes
@pytest.mark.parametrize(
    ("solver", "shape"), [(solve_by_brentq, SCALAR), (solve_by_root, SHAPE)], ids=["brentq", "root"]
)
def test_another_solver_finds_the_same_sequence(solver, shape, regime):
    e, w_query, w_key, bound = draws(regime, shape=shape, seed=1)
    true = solver(e, w_query, w_key, bound)
    x = solve(e, w_query, w_key, bound=bound).x
    np.testing.assert_allclose(x, true, rtol=0, atol=1e-10)


def test_first_token_is_its_residual_and_the_second_follows_the_first():
    e, w_query, w_key, bound = draws("bounded")
    np.testing.assert_array_equal(solve(e[:1], w_query, w_key).x, e[:1])
    x = solve(e, w_query, w_key, bound=bound).x
    np.testing.assert_allclose(
        x[1], e[1] + e[0] / np.sqrt(1 + np.sum(e[0] ** 2) / bound**2), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize(
    "axes",
    [
        pytest.param(((4,), ()), marks=SLOW),
        pytest.param(((), (5,)), marks=SLOW),
        pytest.param(((3, 1), (2,)), marks=SLOW),
        ((2, 0), (2, 1)),
    ],
)
def test_leading_axes_broadcast(axes):
    """Of e and of the weights: alone, and together."""
    e, *_, bound = draws("bounded", axes[0])
    _, w_query, w_key, _ = draws("bounded", axes[1], seed=1)
    solution = solve(e, w_query, w_key, bound=bound)
    leading = np.broadcast_shapes(*axes)
    assert solution.x.shape == (*leading, *SHAPE[:2])
    assert solution.converged.shape == solution.trials.shape == (*leading, SHAPE[0])
    each = [np.broadcast_to(array, (*leading, *array.shape[-2:])) for array in (e, w_query, w_key)]
    for index in np.ndindex(leading):
        alone = solve(*(array[index] for array in each), bound=bound)
        np.testing.assert_allclose(solution.x[index], alone.x, rtol=0, atol=1e-13)


@pytest.mark.slow
def test_vmap_changes_nothing():
    e, w_query, w_key, bound = draws("bounded", (4,))
    bounds = bound * np.array([0.5, 0.8, 0.9, 1.0])
    mapped = quick_jit(jax.vmap(solved))(e, w_query, w_key, bounds)
    for i in range(4):
        alone = solve(e[i], w_query[i], w_key[i], bound=bounds[i])
        np.testing.assert_allclose(mapped[i], alone.x, rtol=0, atol=1e-13)


@pytest.mark.slow
def test_no_jit_changes_nothing():
    e, w_query, w_key, bound = draws("bounded")
    eager = solve_residual(e, w_query, w_key, bound=bound)
    np.testing.assert_allclose(eager.x, solve(e, w_query, w_key, bound=bound).x, atol=1e-13)


# ---- the derivative ---------------------------------------------------------------------------


def solved(*inputs):
    """The sequence as a function of e, W_Q, W_K and, where there is one, the bound."""
    return solve_residual(*inputs[:3], bound=inputs[3] if len(inputs) > 3 else None).x


def inputs_of(regime, **options):
    """Those of `solved`, as JAX arrays."""
    return tuple(jnp.asarray(part) for part in draws(regime, **options) if part is not None)


def true_derivatives(inputs):
    """Derivative of the residuals by every input, of shape (T * d, inputs)."""
    found = []
    for number, array in enumerate(inputs):
        columns = []
        for index in np.ndindex(array.shape):
            moved = [np.asarray(part, complex) for part in inputs]
            moved[number][index] += 1j * dense.STEP
            columns.append(dense.residual(*moved).imag.ravel() / dense.STEP)
        found.append(np.array(columns).T)
    return found


@pytest.mark.parametrize("mode", [pytest.param(jax.jacfwd, marks=SLOW), jax.jacrev])
@pytest.mark.parametrize("regime", [pytest.param("repulsive", marks=pytest.mark.slow), "bounded"])
def test_derivative_is_that_of_the_implicit_function(regime, mode):
    """J dx = de - (d residual / d theta) dtheta, with a dense J."""
    every = tuple(range(3 if regime == "repulsive" else 4))
    derive = quick_jit(lambda *inputs: (solved(*inputs), mode(solved, every)(*inputs)))
    for strength in (1.0, 300.0) if regime == "repulsive" else (1.0,):
        inputs = inputs_of(regime, strength=(strength, strength))
        x, got = derive(*inputs)
        partial = true_derivatives([np.asarray(part) for part in (x, *inputs[1:])])
        identity = np.reshape(got[0], (x.size, x.size)) @ partial[0]
        np.testing.assert_allclose(identity, np.eye(x.size), rtol=0, atol=1e-9)
        for one, moved in zip(got[1:], partial[1:], strict=True):
            expected = -np.linalg.solve(partial[0], moved)
            atol = 1e-9 * np.abs(expected).max()
            np.testing.assert_allclose(np.ravel(one), np.ravel(expected), rtol=0, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fwd", "rev"])
def test_derivatives_to_second_order_match_finite_differences(mode):
    check_grads(jax.jit(solved), inputs_of("bounded", shape=(4, 2, 2)), order=2, modes=[mode])


@pytest.mark.slow
def test_forward_over_reverse_matches_finite_differences():
    """The Hessian of a scalar, as a Laplace approximation takes it."""
    towards = np.cos(np.arange(8.0)).reshape(4, 2)

    @quick_jit
    def gradient(*inputs):
        return jax.grad(lambda *inputs: jnp.sum(towards * solved(*inputs)), (0, 1, 2, 3))(*inputs)

    check_grads(gradient, inputs_of("bounded", shape=(4, 2, 2)), order=1, modes=["fwd"])


def loops(jaxpr):
    """How many variables each while loop of a program carries, inner programs included."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while":
            found.append(len(equation.outvars))
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            found += loops(inner) if hasattr(inner, "eqns") else []
    return found


@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev])
def test_newton_iterations_are_not_differentiated(mode):
    """The derivative's program holds the loop of the value, with no tangents carried along."""
    inputs = inputs_of("bounded")
    value = loops(jax.make_jaxpr(solved)(*inputs))
    assert len(value) == 1
    assert loops(jax.make_jaxpr(mode(solved, (0, 1, 2, 3)))(*inputs)) == value


# ---- what cannot be solved --------------------------------------------------------------------


def folding(shape, count=2000):
    """Residuals and attractive weights: with many of them the map folds."""
    rng = np.random.default_rng(2)
    length, width, rank = shape
    w_key = rng.standard_normal((count, width, rank))
    w_query = w_key + 0.2 * rng.standard_normal(w_key.shape)
    e = 2 * rng.standard_normal((count, length, width))
    if shape == SCALAR:  # past (-4, 4) and a = 0.3, with residuals across the fold
        rows = count // 2
        e[:rows, :2, 0] = -4, 8
        e[:rows, 2, 0] = np.linspace(-3, 3, rows)
        w_query[:rows], w_key[:rows] = 0.3, 1.0
    return e, w_query, w_key


@pytest.mark.slow
@pytest.mark.parametrize("shape", [SCALAR, SHAPE], ids=["scalar", "matrix"])
def test_where_the_map_folds_every_position_is_solved_or_reported(shape):
    inputs = folding(shape)
    solution = solve(*inputs)
    x, converged = np.array(solution.x), np.asarray(solution.converged)
    assert 0 < np.sum(~converged) == solution.unconverged
    # From the first failure on there is nothing, and before it a solution.
    np.testing.assert_array_equal(converged, np.cumprod(converged, axis=1))
    np.testing.assert_array_equal(np.isnan(x), np.broadcast_to(~converged[..., None], x.shape))
    error = np.abs(true_residual(np.nan_to_num(x), *inputs[1:], None) - inputs[0]).max(-1)
    assert error[converged].max() <= 1e-11
    # The other sequences do not notice.
    failed = ~converged.all(axis=1)
    benign = np.where(failed[:, None, None], 0.0, inputs[0])
    np.testing.assert_array_equal(solve(benign, *inputs[1:]).x[~failed], x[~failed])


@pytest.mark.slow
def test_every_solution_found_on_a_fold_is_one_of_those_that_exist():
    """Past (-4, 4), a = 0.3: three tokens have the residual 0, and one the residual 3."""
    inputs = folding(SCALAR)
    tokens = np.asarray(solve(*inputs).x)[:1000, 2, 0]
    grid = np.linspace(-12, 12, 100_001)
    image = grid - 4 * np.tanh(1.2 * grid)  # mu is 4 tanh(4 a x)
    several = 0
    for noise, token in zip(inputs[0][:1000, 2, 0], tokens, strict=True):
        near = np.flatnonzero(np.diff(np.sign(image - noise)))
        several += len(near) > 1
        assert np.abs(grid[near] - token).min() <= 5e-4
    assert several > 300


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_residual_that_is_not_finite_is_reported(value):
    e, w_query, w_key, bound = draws("bounded", (4,))
    before = solve(e, w_query, w_key, bound=bound)
    e[1, 2, 0] = value
    after = solve(e, w_query, w_key, bound=bound)
    np.testing.assert_array_equal(after.converged[1], [True, True, False, False, False, False])
    assert np.isnan(after.x[1, 2:]).all()
    assert after.unconverged == 4
    assert after.trials[1].max() <= 10
    others = np.array([0, 2, 3])
    np.testing.assert_array_equal(after.x[others], before.x[others])
    np.testing.assert_array_equal(after.x[1, :2], before.x[1, :2])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("unit", "dtype"),
    [(1e20, np.float32), (1e-25, np.float32), (1e160, np.float64), (1e-170, np.float64)],
)
def test_residuals_whose_squares_overflow_or_vanish_are_solved_or_reported(unit, dtype):
    """In another unit of length the same sequence is an ordinary one."""
    e, one = np.array([[1.0], [-2.0], [0.2], [0.3]]), np.ones((1, 1))
    solution = solve(*(array.astype(dtype) for array in (unit * e, -one / unit, one / unit)))
    error = dense.residual(np.asarray(solution.x, np.float64) / unit, -one, one) - e
    assert np.all(np.abs(error[solution.converged]) <= 1e-6)


@pytest.mark.slow
def test_failed_sequence_leaves_the_gradient_of_the_others_alone():
    e, w_query, w_key, bound = draws("bounded", (4,))

    def size_of_others(e):
        x = solve_residual(e, w_query, w_key, bound=bound).x
        return jnp.sum(jnp.where(jnp.isnan(x), 0.0, x) ** 2)

    gradient = quick_jit(jax.grad(size_of_others))
    expected = gradient(e)
    e[1, 2, 0] = np.nan
    others = np.array([0, 2, 3])
    np.testing.assert_array_equal(gradient(e)[others], expected[others])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((6, 4), (3, 2), (3, 2)), r"\(6, 4\): expected \(\.\.\., T, d\) with d = 3"),
        (((3,), (3, 2), (3, 2)), r"shape \(3,\): expected"),
        (((0, 3), (3, 2), (3, 2)), r"expected .* T >= 1"),
        (((6, 3), (3, 2), (3, 1)), r"\(3, 2\) and w_key \(3, 1\): expected"),
        (((4, 6, 3), (5, 3, 2), (5, 3, 2)), r"do not broadcast: got .*\(4,\).*\(5,\).*expected"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        solve_residual(*(np.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("bound", [0.0, -1.0, np.nan, np.inf, np.ones(2)])
def test_bound_that_is_not_positive_is_refused(bound):
    e, w_query, w_key, _ = draws("bounded")
    with pytest.raises(ValueError, match=r"bound .*expected .* > 0, or None"):
        solve_residual(e, w_query, w_key, bound=bound)


def test_integers_are_refused():
    with pytest.raises(ValueError, match="int64: expected a floating-point dtype"):
        solve_residual(np.zeros((6, 3), int), np.zeros((3, 2)), np.zeros((3, 2)))
