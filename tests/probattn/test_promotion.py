"""Public functions where the user has forbidden JAX to promote dtypes and ranks."""

import jax
import jax.numpy as jnp
import pytest

import probattn as pa
from probattn import ancestral, positivity, process

pytestmark = pytest.mark.usefixtures("strict_promotion", "strict_ranks")

# Leading axes of x and of the weights, which need not be as many.
LEADING = [((), ()), ((2,), ()), ((), (2,)), ((2,), (3, 1))]
FUNCTIONS = {
    "certificate": pa.certificate,
    "certainly_positive": positivity.certainly_positive,
    "conditional_mean": pa.conditional_mean,
    "embedding_margin": pa.embedding_margin,
    "infeasible": pa.infeasible,
    "jacobian_blocks": pa.jacobian_blocks,
    "log_det": pa.log_det,
    "margin_lower_bound": pa.margin_lower_bound,
    "reduced": lambda *inputs, bound: pa.stability_margin(*inputs, "reduced", bound=bound),
    "reduced_blocks": pa.reduced_blocks,
    "relaxed_barrier": pa.relaxed_barrier,
    "residual": pa.residual,
    "solve_residual": ancestral.solve_residual,
    "stability_margin": pa.stability_margin,
}


def shaped(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float64)


def total(function, *inputs):
    parts = jax.tree.leaves(function(*inputs))
    return sum(jnp.sum(part) for part in parts if jnp.issubdtype(part.dtype, jnp.floating))


@pytest.mark.parametrize("bound", [None, 0.7])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_arrays_and_their_derivatives_promote_nothing(name, bound):
    """Traced alone, since that is when JAX raises; nothing is compiled."""

    def function(*inputs):
        return FUNCTIONS[name](*inputs, bound=bound)

    for of_x, of_weights in LEADING:
        weights = shaped(*of_weights, 3, 2)
        inputs = shaped(*of_x, 5, 3), weights, weights
        jax.eval_shape(function, *inputs)
    # Of the last, in which all have axes that the others lack.
    if name not in ("infeasible", "certainly_positive"):
        jax.eval_shape(jax.grad(lambda *inputs: total(function, *inputs), (0, 1, 2)), *inputs)


def test_margins_of_long_sequences_promote_nothing():
    """Which are iterated, and not decomposed as those of short ones."""
    inputs = shaped(40, 96, 9), shaped(9, 4), shaped(9, 4)
    jax.eval_shape(pa.stability_margin, *inputs)
    jax.eval_shape(pa.embedding_margin, *inputs)


@pytest.mark.parametrize("summed", [False, True])
def test_determinants_of_long_sequences_promote_nothing(summed):
    """Which are computed in other ways than those of short ones."""
    inputs = shaped(40, 96, 9), shaped(9, 4), shaped(9, 4)
    for function in (pa.log_det, pa.relaxed_barrier):
        jax.eval_shape(
            jax.grad(lambda *inputs, of=function: total(of, *inputs), (0, 1, 2)), *inputs
        )


def test_functions_of_the_weights_and_of_queries_promote_nothing():
    weights = shaped(2, 3, 2)
    jax.eval_shape(pa.coupling, weights, shaped(3, 2))
    jax.eval_shape(lambda *pair: pa.is_proper(*pair, bound=0.3), weights, weights)
    jax.eval_shape(pa.attention_weights, shaped(2, 5, 3), shaped(5, 3))


@pytest.mark.parametrize("batch", [(), (4,)])
def test_the_distribution_takes_numpyro_with_it(batch):
    """NumPyro's own densities and draws promote ranks."""

    def draw(w_query, w_key, scale):
        process = pa.CausalAttention(w_query, w_key, scale, 5, bound=0.3)
        x = process.sample(jax.random.key(0), (2,))
        return process.log_prob(x), process.transforms[0].inv(x)

    weights = shaped(*batch, 3, 2)
    density, residuals = jax.eval_shape(draw, weights, weights, shaped(*batch))
    assert density.shape == (2, *batch)
    assert residuals.shape == (2, *batch, 5, 3)


def test_functions_of_the_process_promote_nothing():
    weights = shaped(1, 1)
    inputs = shaped(2, 1), weights, weights
    jax.eval_shape(lambda *inputs: process.bidirectional_log_prob(*inputs, 1.0), *inputs)
