"""Every public function as a program for accelerators, lowered on any machine."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import probattn as pa
from probattn.models.coupling import proper_weights
from tests.support.lowering import assert_lowers, assert_runs_on_accelerators, shape

LENGTH, WIDTH, RANK = 12, 8, 4
X, W = shape(2, LENGTH, WIDTH), shape(WIDTH, RANK)
HEADS = shape(3, WIDTH, RANK)


def of_inputs(function):
    return lambda: assert_lowers(function, X, W, W)


def of_layer():
    def spectrum(x, w_query, w_key, w_value, w_out, gain, frequencies):
        layer = pa.AttentionLayer(
            w_query,
            w_key,
            w_value=w_value,
            w_out=w_out,
            norm=pa.Norm(gain),
            rotary=pa.Rotary(frequencies),
        )
        return pa.block_spectrum(x, layer)

    arrays = HEADS, HEADS, HEADS, shape(3, RANK, WIDTH), shape(WIDTH), shape(RANK // 2)
    assert_lowers(spectrum, X, *arrays)


def margin_of_stage(x, w_query, w_key, gain, frequencies):
    norm, rotary = pa.Norm(gain), pa.Rotary(frequencies)
    stage = pa.AttentionLayer(w_query, w_key, norm=norm, rotary=rotary).stage(x)
    return pa.stability_margin(stage), pa.log_det(stage), pa.infeasible(stage)


def nearest_fold(x, w_query, w_key):
    return pa.nearest_fold(x, w_query, w_key, key=jax.random.key(0), starts=2)


def density(x, w_query, w_key):
    process = pa.CausalAttention(w_query, w_key, jnp.ones(()), LENGTH)
    return process.log_prob(x), process.sample(jax.random.key(0))


def transformed(x, w_query, w_key):
    transform = pa.AttentionResidual(w_query, w_key)
    y = transform(x)
    return y, transform.log_abs_det_jacobian(x, y), transform.inv(y)


PROGRAMS = {
    name: of_inputs(getattr(pa, name))
    for name in (
        "certificate",
        "certified_radius",
        "conditional_mean",
        "embedding_margin",
        "infeasible",
        "jacobian_blocks",
        "log_det",
        "margin_lower_bound",
        "reduced_blocks",
        "relaxed_barrier",
        "residual",
        "sequence_gain",
        "stability_margin",
    )
} | {
    "attention_weights": lambda: assert_lowers(pa.attention_weights, X, X),
    "coupling": lambda: assert_lowers(pa.coupling, W, W),
    "is_proper": lambda: assert_lowers(pa.is_proper, W, W),
    "support_tokens": lambda: assert_lowers(pa.support_tokens, shape(2, LENGTH)),
    "table_certificate": lambda: assert_lowers(pa.table_certificate, shape(20, WIDTH), W, W),
    "nearest_fold": of_inputs(nearest_fold),
    "CausalAttention": of_inputs(density),
    "AttentionResidual": of_inputs(transformed),
    "block_spectrum": of_layer,
    "AttentionStage": lambda: assert_lowers(
        margin_of_stage, X, HEADS, HEADS, shape(WIDTH), shape(RANK // 2)
    ),
}
# What the programs above are made of or give back, and what is computed by NumPy alone.
OTHERS = {"AttentionLayer", "BlockSpectrum", "Norm", "Rotary", "conditional_mass"}
SLOW = {"AttentionStage", "certified_radius", "nearest_fold", "sequence_gain", "stability_margin"}


def test_all_public_functions_are_here():
    assert PROGRAMS.keys() | OTHERS == set(pa.__all__)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in sorted(PROGRAMS)],
)
def test_lowers_to_what_accelerators_run_alone(name):
    PROGRAMS[name]()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sigma_min", "reduced", "log_det"])
def test_so_do_derivatives_of_margins(kind):
    def total(*inputs):
        return jnp.sum(pa.stability_margin(*inputs, kind=kind))

    assert_lowers(jax.grad(total, argnums=(0, 1, 2)), X, W, W)


def test_so_do_bounded_contexts_and_proper_couplings():
    def barrier(x, w_query, w_key):
        return pa.relaxed_barrier(x, *proper_weights(w_query, w_key, bound=1.5), bound=1.5)

    assert_lowers(barrier, X, W, W)


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (lambda x: jax.pure_callback(abs, x, x), ValueError),
        (lambda x: jnp.linalg.eigvals(x), AssertionError),
        (lambda x: lax.linalg.svd(x, algorithm=lax.linalg.SvdAlgorithm.QR), NotImplementedError),
    ],
    ids=["callback", "hybrid", "no_method"],
)
def test_what_needs_the_host_is_found(function, error):
    with pytest.raises(error):
        assert_lowers(function, shape(4, 4))


def test_double_precision_is_found():
    traced = jax.jit(lambda x: x * 2).trace(shape(4, dtype=jnp.float64))
    with pytest.raises(AssertionError):
        assert_runs_on_accelerators(traced)
