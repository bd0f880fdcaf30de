"""The bound of a minibatch in parts is that of all of it."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from probattn.inference import FitConfig
from probattn.inference.fitting.elbo import AccumulatedELBO, OrderedELBO
from probattn.inference.guides.guides import make_guide


def weights():
    prior = dist.Normal(0, 2).expand((3,)).to_event(1)
    return {"weights": numpyro.sample("weights", prior)}


def model(inputs, targets):
    slopes = weights()["weights"]
    with numpyro.plate("sequences", 20, subsample_size=len(inputs)):
        numpyro.sample("y", dist.Normal(inputs @ slopes, 1.0), obs=targets[:, 0])


def test_value_and_gradient_are_those_of_the_whole_minibatch():
    rng = np.random.default_rng(0)
    inputs, targets = jnp.asarray(rng.normal(size=(6, 3))), jnp.asarray(rng.normal(size=(6, 1)))
    guide = make_guide("map", weights, {"weights": jnp.arange(3.0)})
    with numpyro.handlers.seed(rng_seed=0), numpyro.handlers.trace() as trace:
        guide()
    params = {key: site["value"] for key, site in trace.items() if site["type"] == "param"}

    def loss(elbo):
        def of_params(params):
            return elbo.loss(jax.random.key(1), params, model, guide, inputs, targets)

        return jax.value_and_grad(of_params)(params)

    whole, parts = loss(OrderedELBO()), loss(AccumulatedELBO(3))
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-6)
    np.testing.assert_allclose(
        parts[1]["weights_auto_loc"], whole[1]["weights_auto_loc"], rtol=1e-6
    )


def test_a_number_of_parts_that_makes_none_is_refused():
    with pytest.raises(ValueError, match=r"gradient_accumulation is 3 and fit\.batch 4"):
        FitConfig(batch=4, gradient_accumulation=3)
    with pytest.raises(ValueError, match="gradient_accumulation is 2 with noise"):
        FitConfig(batch=4, gradient_accumulation=2, embedding_noise=0.1)
