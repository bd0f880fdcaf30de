"""The block that really runs against the Jacobian of the whole causal map."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import probattn as pa
from tests.support import real_attention as real
from tests.support.dense import quick_jit

pytestmark = pytest.mark.usefixtures("strict_promotion", "strict_ranks")

# The widths of H r_v rows: below half of d = 6, below d, and above it.
FAST = ("capped",)
EVERY = [
    pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in real.OPTIONS
]


@pytest.mark.parametrize("name", EVERY)
def test_the_spectrum_is_that_of_the_whole_causal_map(name):
    options = real.OPTIONS[name]
    n = real.numbers(options)
    got = quick_jit(pa.block_spectrum)(n["x"], real.layer(options, n))
    dense = real.diagonal_blocks(functools.partial(real.block, options, n), n["x"])
    sign, log_abs = np.linalg.slogdet(dense)
    sizes = np.linalg.svd(dense, compute_uv=False)
    np.testing.assert_array_equal(got.sign, sign)
    np.testing.assert_allclose(got.log_abs, log_abs, atol=1e-12)
    np.testing.assert_allclose(got.smallest, sizes[:, -1], atol=1e-13)
    np.testing.assert_allclose(got.largest, sizes[:, 0], rtol=1e-13)


def test_a_window_of_no_past_leaves_a_token_to_itself():
    """A network whose window has one token, the own one: attention is then a linear map."""
    options = dataclasses.replace(real.OPTIONS["bare"], window=0)
    n = real.numbers(options)
    got = pa.block_spectrum(n["x"], real.layer(options, n))
    sizes = np.linalg.svd(np.eye(real.D) + n["w_value"][0] @ n["w_out"][0], compute_uv=False)
    np.testing.assert_allclose(got.smallest, np.full(real.T, sizes[-1]), rtol=1e-12)
    np.testing.assert_allclose(got.largest, np.full(real.T, sizes[0]), rtol=1e-12)


def test_the_reference_is_causal():
    options = real.OPTIONS["all"]
    n = real.numbers(options)
    whole = real.jacobian(functools.partial(real.block, options, n), n["x"])
    for t in range(real.T):
        assert not whole[t, :, t + 1 :].any()


@pytest.mark.slow
def test_a_stream_that_is_not_finite_spoils_no_earlier_position():
    options = real.OPTIONS["capped"]
    n = real.numbers(options)
    lost = n["x"].copy()
    lost[3, 1] = np.inf
    found = jax.jit(pa.block_spectrum)
    got, clean = (found(x, real.layer(options, n)) for x in (lost, n["x"]))
    np.testing.assert_array_equal(got.smallest[:3], clean.smallest[:3])
    assert np.isnan(got.smallest[3:]).all()
