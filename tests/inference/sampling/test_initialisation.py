"""Starting chains: at the values that NumPyro would take, without drawing them twice."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import NUTS

from probattn.inference.sampling.initialisation import init_to_given, with_prototypes


def model():
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with numpyro.plate("entries", 3):
        numpyro.sample("direction", dist.Dirichlet(jnp.ones(4)))
        numpyro.sample("location", dist.Normal(0.0, scale))


def first_state(strategy):
    kernel = NUTS(model, init_strategy=strategy)
    return lambda key: kernel.init(key, 10).z


def primitives(jaxpr):
    """List the primitives of a program and of all programs within it."""
    found = []
    for equation in jaxpr.eqns:
        found.append(equation.primitive.name)
        inner = jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns"))
        for each in inner:
            each = getattr(each, "jaxpr", each)
            found += primitives(each) if hasattr(each, "eqns") else []
    return found


@pytest.mark.slow
def test_chains_start_where_numpyro_starts_them_and_draw_from_the_prior_once():
    plain = partial(init_to_given, {"location": np.array([1.0, 2.0, 3.0])})
    key = jax.random.key(4)
    expected = jax.jit(first_state(plain))(key)
    found = jax.jit(first_state(with_prototypes(plain)))(key)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)

    def draws(strategy):  # points on a simplex are drawn by way of gammas
        return primitives(jax.make_jaxpr(first_state(strategy))(key).jaxpr).count("random_gamma")

    assert draws(plain) == 2
    assert draws(with_prototypes(plain)) == 1
