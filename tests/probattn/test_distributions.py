"""The attention process for NumPyro: its exact density, its sampler, and NumPyro's protocols."""

import functools
import pickle

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions.batch_util import promote_batch_shape
from numpyro.infer import MCMC, NUTS, Predictive
from numpyro.infer.reparam import TransformReparam
from numpyro.infer.util import log_density

import probattn as pa
from tests.support import dense
from tests.support.cases import BY_NAME, Case, every_shape, make, of_shape, shapes, stacked
from tests.support.dense import quick_jit

LENGTH, WIDTH, RANK = 5, 3, 2
NIGHTLY = pytest.mark.nightly
SLOW = pytest.mark.slow
KEY = jax.random.key(0)


def weights(*leading):
    """W_Q and W_K of a repulsive coupling."""
    w_query = np.random.default_rng(0).standard_normal((*leading, WIDTH, RANK)) / 2
    return w_query, -w_query


def process(*leading, scale=1.0, **options):
    return pa.CausalAttention(*weights(*leading), scale, LENGTH, **options)


def sequences(*leading):
    return np.random.default_rng(1).standard_normal((*leading, LENGTH, WIDTH))


# Compiled: eager, every operation of a new shape would be compiled on its own.
density = quick_jit(lambda p, x: p.log_prob(x))
sample = quick_jit(lambda p, count: p.sample(KEY, (count,)), static_argnums=1)
inverse = quick_jit(lambda t, e: t.inv(e))


# ---- the density ------------------------------------------------------------------------------


def true_log_prob(x, w_query, w_key, scale, bound):
    """Log density from the determinant of the whole Jacobian, and sigma_min over its blocks."""
    x, w_query, w_key = (np.asarray(part, np.float64) for part in (x, w_query, w_key))
    e = dense.residual(x, w_query, w_key, bound)
    jacobian = dense.whole_jacobian(x, w_query, w_key, bound)
    diagonal = dense.diagonal_blocks(jacobian, len(x))
    sigma_min = np.linalg.svd(diagonal, compute_uv=False).min()
    if np.any(np.linalg.slogdet(diagonal)[0] <= 0):
        return -np.inf, sigma_min
    noise = -np.sum((e / scale) ** 2) / 2 - e.size * np.log(scale * np.sqrt(2 * np.pi))
    return noise + np.linalg.slogdet(jacobian)[1], sigma_min


def log_prob_of(x, w_query, w_key, scale, bound):
    return pa.CausalAttention(w_query, w_key, scale, len(x), bound=bound).log_prob(x)


log_prob = quick_jit(log_prob_of)
log_probs = quick_jit(jax.vmap(log_prob_of, (0, 0, 0, None, 0)))


def assert_matches_whole_jacobian(value, inputs, scale, bound, name=""):
    true, sigma_min = true_log_prob(*inputs, scale, bound)
    if true == -np.inf:
        assert value == -np.inf, name
        return
    # Within 2e-6 of a singular block one rounding of an entry, eps, already moves log|det| by
    # eps / sigma_min, in the oracle as in the code.
    rounding = 8 * np.finfo(np.float64).eps / sigma_min if sigma_min <= 2e-6 else 0.0
    assert abs(value - true) <= 1e-9 * max(1, abs(true)) + rounding, name


def check_shape(shape, bounds):
    cases = of_shape(shape)
    values = log_probs(*stacked(cases), 0.8, bounds)
    for number, case in enumerate(cases):
        bound = None if bounds is None else bounds[number]
        assert_matches_whole_jacobian(values[number], make(case), 0.8, bound, str(case))


@every_shape
def test_log_prob_matches_the_whole_jacobian(shape):
    check_shape(shape, None)


@shapes("one_token", "two_tokens", "square", "wide", "rank_one")
def test_bounded_log_prob_matches_the_whole_jacobian(shape):
    sizes = [np.mean(make(case)[0] ** 2) * case.width for case in of_shape(shape)]
    check_shape(shape, np.sqrt(sizes))


@pytest.mark.slow
@hypothesis.given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["wide"]),
    st.sampled_from(["random", "attractive", "repulsive"]),
    st.floats(-2, 1),
    st.floats(-1, 1),
    st.none() | st.floats(-1, 1),
)
def test_log_prob_matches_the_whole_jacobian_anywhere(
    seed, shape, kind, log_size, log_scale, log_bound
):
    template = BY_NAME[shape]
    shape = template.length, template.width, template.rank
    inputs = make(Case("", *shape, scale=10**log_size, seed=seed, kind=kind))
    bound = None if log_bound is None else 10**log_bound
    value = log_prob(*inputs, 10**log_scale, bound)
    assert_matches_whole_jacobian(value, inputs, 10**log_scale, bound)


def test_folds_in_two_positions_do_not_cancel():
    """The determinant of the whole Jacobian is positive there, and the density still zero."""
    x = np.array([[-4.0], [4.0], [0.0], [0.0]])
    w_query, w_key = np.full((1, 1), 0.3), np.ones((1, 1))
    sign, _ = np.linalg.slogdet(dense.reduced_blocks(x, w_query, w_key))
    np.testing.assert_array_equal(sign, [1, 1, -1, -1])
    assert log_prob(x, w_query, w_key, 1.0, None) == -np.inf


@pytest.mark.parametrize(
    "name",
    ["thin", *(pytest.param(n, marks=SLOW) for n in ("square_repulsive", "wide_attractive"))],
)
def test_float32_log_prob_matches_float64_oracle(name):
    inputs = make(BY_NAME[name], np.float32)
    value = log_prob(*inputs, 0.8, 2.0)
    assert value.dtype == np.float32
    true, _ = true_log_prob(*(array.astype(np.float64) for array in inputs), 0.8, 2.0)
    assert abs(value - true) <= 1e-5 * max(1, abs(true))


def test_gradient_of_log_prob_matches_the_whole_jacobian():
    """In x, W_Q, W_K, the scale and the bound."""
    x, w_query, w_key = make(BY_NAME["square"])
    inputs = x[:4], w_query, w_key, 0.8, 2.0
    got = quick_jit(jax.grad(log_prob_of, tuple(range(5))))(*inputs)

    def noise(x, w_query, w_key, scale, bound):
        e = dense.residual(x, w_query, w_key, bound)
        return -np.sum((e / scale) ** 2) / 2 - e.size * np.log(scale)

    found = dense.dense_of(*inputs[:3], 2.0)
    slopes = [part.sum(0) for part in dense.log_abs_slopes(found)]
    log_det_slopes = [*slopes[:3], np.zeros(()), slopes[3]]
    for number, one in enumerate(got):
        expected = np.array(log_det_slopes[number])
        for index in np.ndindex(expected.shape):
            moved = [np.asarray(part, complex) for part in inputs]
            moved[number][index] += 1j * dense.STEP
            expected[index] += noise(*moved).imag / dense.STEP
        np.testing.assert_allclose(one, expected, rtol=1e-9, atol=1e-9)


# ---- the sampler ------------------------------------------------------------------------------

DRAWS = 50_000


def regime(name):
    """A proper process of three tokens in the plane, strongly coupled."""
    w_query = np.random.default_rng(0).standard_normal((2, 2))
    if name == "repulsive":
        matrices, bound = (20 * w_query, -w_query), None
    else:
        w_key = w_query + 0.2 * np.random.default_rng(1).standard_normal((2, 2))
        bound, size = 1.0, np.linalg.norm(pa.coupling(w_query, w_key), 2)
        matrices = w_query * 0.95 / size, w_key
    assert pa.is_proper(*matrices, bound=bound)
    return pa.CausalAttention(*matrices, 1.0, 3, bound=bound)


@functools.cache
def draws(name):
    return sample(regime(name), DRAWS)


regimes = pytest.mark.parametrize("name", ["repulsive", "bounded"])


@pytest.mark.slow
@regimes
def test_residuals_of_samples_are_independent_standard_normal(name):
    p = regime(name)
    inputs = (np.asarray(part) for part in (draws(name), p.w_query, p.w_key))
    e = np.reshape(dense.residual(*inputs, p.bound), (DRAWS, -1))
    assert scipy.stats.kstest(e.ravel(), "norm").pvalue > 0.01
    for entry in e.T:
        assert scipy.stats.kstest(entry, "norm").pvalue > 0.01 / e.shape[1]
    correlation = np.corrcoef(e.T) - np.eye(e.shape[1])
    assert np.abs(correlation).max() < 4 / np.sqrt(DRAWS)


@pytest.mark.slow
@regimes
def test_density_is_normalised_and_is_that_of_the_samples(name):
    """The mean of q / p over draws from p is 1 for any density q.

    With q normal of width tau the weights have finite variance where q^2 / p is integrable. Their
    residuals have |e_t|^2 <= 2 |x_t|^2 + 2 |mu_t|^2, and det D_t is bounded below. Unbounded, mu_t
    is no longer than the longest of x_0 .. x_{t-1}, so the sum over t of |e_t|^2 is at most
    2 T |x|^2, and tau^2 < 1 / T suffices; bounded, |mu_t| <= c, and tau^2 < 2.
    """
    x, p = draws(name), regime(name)
    q = dist.Normal(jnp.zeros((3, 2)), 0.55 if name == "repulsive" else 1.0).to_event(2)
    log_p, log_q = density(p, x), density(q, x)
    ratios = np.exp(log_q - log_p)
    error = ratios.std() / np.sqrt(DRAWS)
    assert abs(ratios.mean() - 1) <= 3 * error
    # It would tell a density without its determinants: the mean is then theirs under q.
    inputs = (np.asarray(part) for part in (x, p.w_query, p.w_key))
    log_dets = np.linalg.slogdet(dense.reduced_blocks(*inputs, p.bound))[1].sum(-1)
    without = np.exp(log_q - (log_p - log_dets))
    assert abs(without.mean() - 1) > 10 * without.std() / np.sqrt(DRAWS)


# ---- shapes -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("leading", "scale"),
    [
        pytest.param((), 0.5, id="none", marks=SLOW),
        pytest.param((2,), 0.5, id="weights", marks=SLOW),
        pytest.param((), np.array([0.5, 2.0]), id="scale", marks=SLOW),
        pytest.param((3, 1), np.array([0.5, 2.0]), id="both"),
    ],
)
def test_batch_is_that_of_weights_and_scale(leading, scale):
    batched = process(*leading, scale=scale)
    batch = np.broadcast_shapes(leading, np.shape(scale))
    assert (batched.batch_shape, batched.event_shape) == (batch, (LENGTH, WIDTH))
    x = sample(batched, 2000)
    assert x.shape == batched.shape((2000,)) == (2000, *batch, LENGTH, WIDTH)
    value = density(batched, x)
    w_query, w_key = (np.broadcast_to(w, (*batch, WIDTH, RANK)) for w in weights(*leading))
    scales = np.broadcast_to(scale, batch)
    assert value.shape == (2000, *batch)
    for index in np.ndindex(batch):
        element = (slice(None), *index)
        alone = pa.CausalAttention(w_query[index], w_key[index], scales[index], LENGTH)
        np.testing.assert_allclose(value[element], density(alone, x[element]), rtol=1e-11)
        e = dense.residual(np.asarray(x[element]), w_query[index], w_key[index]) / scales[index]
        assert abs(e.mean()) < 5 / np.sqrt(e.size)
        assert abs(e.std() - 1) < 5 / np.sqrt(2 * e.size)


@pytest.mark.slow
def test_expanded_independent_and_masked_densities():
    p, x = process(2), sequences(3, 2)
    value = density(p, x)
    expanded = p.expand((3, 2))
    assert expanded.batch_shape == (3, 2)
    assert sample(expanded, 4).shape == (4, *x.shape)
    np.testing.assert_array_equal(density(expanded, x), value)
    together = expanded.to_event(1)
    assert (together.batch_shape, together.event_shape) == ((3,), (2, LENGTH, WIDTH))
    np.testing.assert_allclose(density(together, x), value.sum(1), rtol=1e-12)
    mask = np.array([True, False])
    np.testing.assert_array_equal(density(expanded.mask(mask), x), np.where(mask, value, 0))
    between = process(1).expand((2,))
    assert sample(between, 4).shape == (4, 2, LENGTH, WIDTH)


@pytest.mark.slow
def test_distribution_is_a_pytree():
    p, x = process(2, scale=np.array([0.5, 2.0]), bound=1.0), sequences(2)
    leaves, structure = jax.tree.flatten(p)
    rebuilt = jax.tree.unflatten(structure, leaves)
    through_jit = jax.jit(lambda p: p)(p)
    for other in (rebuilt, through_jit, pickle.loads(pickle.dumps(p))):
        assert (other.batch_shape, other.event_shape) == (p.batch_shape, p.event_shape)
        np.testing.assert_array_equal(density(other, x), density(p, x))
        np.testing.assert_array_equal(sample(other, 4), sample(p, 4))


@pytest.mark.slow
def test_density_needs_no_jit():
    p, x = process(2, scale=np.array([0.5, 2.0]), bound=1.0), sequences(2)
    np.testing.assert_allclose(density(p, x), p.log_prob(x), rtol=1e-12)


@pytest.mark.slow
def test_sampler_needs_no_jit():
    p = process(2, scale=np.array([0.5, 2.0]), bound=1.0)
    np.testing.assert_allclose(sample(p, 4), p.sample(KEY, (4,)), rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_vmap_over_distributions():
    """Made by vmap, with a bound and a scale of its own each, and used by vmap."""
    w_query, w_key = weights(3)
    scales, bounds, x = np.array([0.5, 1.0, 2.0]), np.array([0.5, 1.0, 2.0]), sequences(3)

    def make_one(w_query, w_key, scale, bound):
        return pa.CausalAttention(w_query, w_key, scale, LENGTH, bound=bound)

    many = jax.vmap(make_one)(w_query, w_key, scales, bounds)
    values = quick_jit(jax.vmap(lambda p, x: p.log_prob(x)))(many, x)
    samples = quick_jit(jax.vmap(lambda p: p.sample(KEY, (4,))))(many)
    for i in range(3):
        one = make_one(w_query[i], w_key[i], scales[i], bounds[i])
        np.testing.assert_allclose(values[i], density(one, x[i]), rtol=1e-12)
        np.testing.assert_allclose(samples[i], sample(one, 4), rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("bounds", [None, np.array([0.5, 1.0, 2.0])], ids=["unbounded", "bounded"])
def test_a_stack_of_distributions_that_numpyro_promotes(bounds):
    """As what leaves NumPyro's scan: the residuals of its draws are those of its own weights."""
    w_query, w_key = weights(3)
    scales = np.array([0.1, 1.0, 10.0])

    def make_one(w_query, w_key, scale, bound):
        return pa.CausalAttention(w_query, w_key, scale, LENGTH, bound=bound)

    axes = 0, 0, 0, None if bounds is None else 0
    many = promote_batch_shape(jax.vmap(make_one, axes)(w_query, w_key, scales, bounds))
    assert many.batch_shape == many.base_dist.batch_shape == (3,)
    x = np.asarray(sample(many, 40))
    assert x.shape == (40, 3, LENGTH, WIDTH)
    values = density(many, x)
    for i in range(3):
        bound = None if bounds is None else bounds[i]
        e = dense.residual(x[:, i], w_query[i], w_key[i], bound) / scales[i]
        assert abs(e.mean()) < 5 / np.sqrt(e.size)
        assert abs(e.std() - 1) < 5 / np.sqrt(2 * e.size)
        one = pa.CausalAttention(w_query[i], w_key[i], scales[i], LENGTH, bound=bound)
        np.testing.assert_allclose(values[:, i], density(one, x[:, i]), rtol=1e-10)


# ---- in a model -------------------------------------------------------------------------------


def model(observed=None):
    """Three sequences of two processes, an unknown strength of the coupling, and one datum."""
    strength = numpyro.sample("strength", dist.Normal(0, 1))
    w_query, w_key = weights(2)
    p = pa.CausalAttention(strength * w_query, w_key, 1.5, LENGTH, bound=0.5)
    with numpyro.plate("sequences", 3, dim=-2), numpyro.plate("processes", 2):
        x = numpyro.sample("x", p, obs=observed)
    numpyro.sample("y", dist.Normal(x[..., -1, :].sum(), 1), obs=1.0)


non_centred = handlers.reparam(model, config={"x": TransformReparam()})


def test_site_in_a_plate_has_the_density_of_its_sequences():
    x, strength = sequences(3, 2), jnp.asarray(0.7)
    value = quick_jit(lambda x, y: log_density(model, (x,), {}, {"strength": y})[0])(x, strength)
    trace = handlers.trace(handlers.substitute(model, {"strength": strength})).get_trace(x)
    assert trace["x"]["fn"].batch_shape == (3, 2)
    w_query, w_key = weights(2)
    priors = scipy.stats.norm.logpdf(0.7) + scipy.stats.norm.logpdf(1 - x[..., -1, :].sum())
    true = [
        true_log_prob(x[i, j], 0.7 * w_query[j], w_key[j], 1.5, 0.5)[0] for i, j in np.ndindex(3, 2)
    ]
    np.testing.assert_allclose(value, priors + np.sum(true), rtol=1e-9)


@pytest.mark.slow
def test_non_centred_form_is_the_same_density():
    """After the change of variables x -> e, with its determinants."""
    kinds = {}

    @quick_jit
    def drawn():
        trace = handlers.trace(handlers.seed(non_centred, 0)).get_trace()
        kinds["x"] = trace["x"]["type"]
        return {name: trace[name]["value"] for name in ("strength", "x", "x_base")}

    values = drawn()
    assert kinds["x"] == "deterministic"
    x, e = np.asarray(values["x"]), values["x_base"]
    assert e.shape == (3, 2, LENGTH, WIDTH)
    w_query, w_key = weights(2)
    log_dets = 0.0
    for i, j in np.ndindex(3, 2):
        inputs = x[i, j], np.asarray(values["strength"]) * w_query[j], w_key[j], 0.5
        np.testing.assert_allclose(e[i, j], dense.residual(*inputs), rtol=0, atol=1e-12)
        log_dets += np.linalg.slogdet(dense.whole_jacobian(*inputs))[1]
    given = {"strength": values["strength"], "x": x}
    centred = quick_jit(lambda given: log_density(model, (), {}, given)[0])(given)
    given = {"strength": values["strength"], "x_base": e}
    other = quick_jit(lambda given: log_density(non_centred, (), {}, given)[0])(given)
    np.testing.assert_allclose(centred, other + log_dets, rtol=1e-9)


SCANNED = {
    "none": ((), 0.5, 1),
    "weights": ((2,), 0.5, 1),
    "scale": ((), np.array([0.5, 2.0]), 1),
    "plate": ((2,), np.array(0.5), 3),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "bound"),
    [
        pytest.param(
            name,
            bound,
            marks=[] if (name, repr(bound)) in (("plate", "0.5"), ("scale", "None")) else NIGHTLY,
            id=f"{name}-{bound!r}",
        )
        for name in SCANNED
        for bound in (None, 2, 0.5, np.float32(0.5))
    ],
)
def test_scan_sums_the_densities_of_its_steps(name, bound):
    """NumPyro stacks the leaves of the steps' distributions; the bound has a gradient too."""
    leading, scale, plate = SCANNED[name]
    w_query, w_key = weights(4, *leading)
    batch = np.broadcast_shapes(leading, np.shape(scale))
    x = jnp.asarray(sequences(4, *(() if plate == 1 else (plate,)), *batch))

    def scanned(bound):
        def step(carry, each):
            p = pa.CausalAttention(*each, scale, LENGTH, bound=bound)
            if plate == 1:
                return carry, numpyro.sample("x", p)
            with numpyro.plate("sequences", plate, dim=-2):
                return carry, numpyro.sample("x", p)

        return log_density(lambda: scan(step, None, (w_query, w_key)), (), {}, {"x": x})[0]

    def summed(bound):
        return sum(
            pa.CausalAttention(*each, scale, LENGTH, bound=bound).log_prob(one).sum()
            for *each, one in zip(w_query, w_key, x, strict=True)
        )

    if isinstance(bound, float):
        value, expected = (quick_jit(jax.value_and_grad(f))(bound) for f in (scanned, summed))
    else:
        value, expected = (quick_jit(lambda f=f: f(bound))() for f in (scanned, summed))
    np.testing.assert_allclose(value, expected, rtol=1e-10)


@pytest.mark.slow
def test_predictive_draws_both_forms_alike():
    for form in (model, non_centred):
        drawn = Predictive(form, num_samples=500)(KEY)
        assert drawn["x"].shape == (500, 3, 2, LENGTH, WIDTH)
        w_query, w_key = weights(2)
        scaled = drawn["strength"][:, None, None, None, None] * w_query
        e = dense.residual(*map(np.asarray, (drawn["x"], scaled, w_key)), 0.5) / 1.5
        assert abs(e.mean()) < 5 / np.sqrt(e.size)
        assert abs(e.std() - 1) < 5 / np.sqrt(2 * e.size)


@pytest.mark.slow
def test_nuts_draws_from_the_process():
    """Its draws have the residuals of the sampler's, so log_prob and its gradient fit together."""
    p = pa.CausalAttention(np.full((1, 1), 0.9), np.ones((1, 1)), 1.0, 3, bound=1.0)
    kernel = NUTS(lambda: numpyro.sample("x", p))
    mcmc = MCMC(kernel, num_warmup=200, num_samples=1000, progress_bar=False)
    mcmc.run(KEY)
    assert mcmc.get_extra_fields()["diverging"].sum() == 0
    drawn = (np.asarray(part) for part in (mcmc.get_samples()["x"], p.w_query, p.w_key))
    e = np.reshape(dense.residual(*drawn, 1.0), (1000, 3))
    sizes = np.array([numpyro.diagnostics.effective_sample_size(entry[None]) for entry in e.T])
    assert np.all(np.abs(e.mean(0)) < 4 / np.sqrt(sizes))
    np.testing.assert_allclose(e.std(0), 1, atol=0.1)


# ---- the transform ----------------------------------------------------------------------------


@pytest.mark.slow
def test_transform_inverts_itself():
    t, x = pa.AttentionResidual(*weights(), bound=1.0), sequences(2)
    assert t.inv.inv is t
    e = quick_jit(lambda t, x: t(x))(t, x)
    np.testing.assert_allclose(e[0], dense.residual(x[0], *weights(), 1.0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(inverse(t, e), x, rtol=0, atol=1e-12)
    assert jax.jit(pa.AttentionResidual.solve)(t, e).unconverged == 0


@pytest.mark.slow
def test_what_the_inverse_does_not_solve_is_nan():
    t, e = pa.AttentionResidual(*weights(), bound=1.0), sequences(2)
    e[1, 2, 0] = np.inf
    solution = jax.jit(pa.AttentionResidual.solve)(t, e)
    assert solution.unconverged == LENGTH - 2
    np.testing.assert_array_equal(np.isnan(inverse(t, e)).any(-1), ~solution.converged)


def test_transforms_are_equal_when_they_map_alike():
    w_query, w_key = weights()
    t = pa.AttentionResidual(w_query, w_key, bound=1.0)
    leaves, structure = jax.tree.flatten(t)
    for same in (
        pa.AttentionResidual(w_query.copy(), w_key.copy(), bound=1.0),
        jax.tree.unflatten(structure, leaves),
        jax.jit(lambda t: t)(t),
        pickle.loads(pickle.dumps(t)),
    ):
        assert t == same
        assert t.inv == same.inv
    for other in (
        pa.AttentionResidual(2 * w_query, w_key, bound=1.0),
        pa.AttentionResidual(w_query, 2 * w_key, bound=1.0),
        pa.AttentionResidual(w_query, w_key, bound=2.0),
        pa.AttentionResidual(w_query, w_key),
        pa.AttentionResidual(*weights(2), bound=1.0),
        t.inv,
    ):
        assert t != other


def test_traced_transform_equals_itself_only():
    """With its bound traced or not; of others the values cannot be compared."""

    def equal(w_query, w_key, bound):
        t = pa.AttentionResidual(w_query, w_key, bound=bound)
        return t == t, t.inv == t.inv, t == pa.AttentionResidual(w_key, w_query, bound=bound)

    assert jax.jit(equal)(*weights(), 1.0) == (True, True, False)
    assert jax.jit(functools.partial(equal, bound=1.0))(*weights()) == (True, True, False)


@quick_jit
def log_abs_det_jacobians(t, x):
    return t.log_abs_det_jacobian(x, t(x)), t.inv.log_abs_det_jacobian(t(x), x)


def test_log_abs_det_jacobian_matches_the_whole_jacobian():
    """Also where the map folds, and negated by the inverse."""
    for name in ("square", "square_folded"):
        x, w_query, w_key = make(BY_NAME[name])
        t = pa.AttentionResidual(w_query, w_key)
        expected = np.linalg.slogdet(dense.whole_jacobian(x, w_query, w_key))[1]
        own, inverse = log_abs_det_jacobians(t, x)
        np.testing.assert_allclose(own, expected, rtol=1e-9)
        np.testing.assert_allclose(inverse, -expected, rtol=1e-9)


@pytest.mark.parametrize("leading", [(), (2,), (4, 1), (4, 2)])
def test_shapes_are_announced(leading):
    t, x = pa.AttentionResidual(*weights(2)), sequences(*leading)
    e = jax.eval_shape(t, x)
    assert t.forward_shape(x.shape) == e.shape
    assert t.inverse_shape(x.shape) == jax.eval_shape(t.inv, e).shape == e.shape
    assert jax.eval_shape(t.log_abs_det_jacobian, x, e).shape == e.shape[:-2]
    assert t.domain.event_dim == t.codomain.event_dim == 2


# ---- bad input --------------------------------------------------------------------------------

GOOD = {"w_query": weights()[0], "w_key": weights()[1], "scale": 1.0, "length": LENGTH}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"w_query": np.full((3, 2), np.nan)}, "w_query has entries that are not finite: expected"),
        ({"w_key": np.full((3, 2), np.inf)}, "w_key has entries that are not finite: expected"),
        ({"w_key": np.ones((2, 2))}, r"\(3, 2\) and w_key \(2, 2\): expected"),
        ({"scale": 0.0}, "scale is 0.0: expected finite numbers > 0"),
        ({"scale": [1.0, -1.0]}, r"scale is \[1.0, -1.0\]: expected finite numbers > 0"),
        ({"scale": np.nan}, "scale is nan: expected finite numbers > 0"),
        ({"length": 0}, "length is 0: expected an integer >= 1"),
        ({"length": True}, "length is True: expected an integer >= 1"),
        ({"length": 5.0}, "length is 5.0: expected an integer >= 1"),
        ({"bound": 0.0}, "bound is 0.0: expected a finite number > 0, or None"),
        ({"bound": np.ones(2)}, r"bound has shape \(2,\): expected one number > 0, or None"),
        (
            {"w_query": weights(4)[0], "scale": np.ones(3)},
            r"scale has shape \(3,\) .*\(4, 3, 2\): expected",
        ),
    ],
)
def test_argument_that_does_not_fit_is_refused_in_one_line(bad, message):
    with pytest.raises(ValueError, match=message) as error:
        pa.CausalAttention(**(GOOD | bad))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(LENGTH, 2), (WIDTH,)])
def test_sequence_of_another_width_is_refused(shape):
    for refuses in (process().log_prob, process().transforms[0].inv):
        with pytest.raises(ValueError, match=r"expected \(\.\.\., T, d\) with d = 3"):
            refuses(np.zeros(shape))
    with pytest.raises(ValueError, match=r"expected \(\.\.\., T, d\) with d = 3"):
        process().transforms[0].forward_shape(shape)


@pytest.mark.parametrize("length", [1, LENGTH - 1, LENGTH + 1])
def test_sequence_of_another_length_is_refused(length):
    with pytest.raises(ValueError, match=rf"{length}.*expected.*{LENGTH}"):
        process().log_prob(np.zeros((length, WIDTH)))


def test_traced_arguments_are_left_to_numpyro():
    """A traced scale cannot be refused; one that is not positive has no density."""

    @jax.jit
    def density(w_query, scale):
        p = pa.CausalAttention(w_query, weights()[1], scale, LENGTH, validate_args=True)
        return p.log_prob(sequences())

    expected = true_log_prob(sequences(), *weights(), 1.5, None)[0]
    np.testing.assert_allclose(density(weights()[0], 1.5), expected, rtol=1e-12)
    assert not np.isfinite(density(weights()[0], -1.5))


@pytest.mark.slow
@pytest.mark.parametrize("validate", [True, None])
def test_sequence_that_is_not_finite_has_no_density(validate):
    x = sequences()
    x[2, 1] = np.nan
    with pytest.warns(UserWarning, match="support"):
        assert process(validate_args=validate).log_prob(x) == -np.inf
