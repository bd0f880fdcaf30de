"""Functions that run NumPyro's models: one thread at a time."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from probattn.inference import (
    SampleConfig,
    compare,
    fit,
    guide_draws,
    sample,
    to_datatree,
)
from probattn.inference.runtime.one_thread import one_thread_at_a_time


def test_no_two_threads_are_in_such_functions_and_one_may_call_another():
    inside = []

    @one_thread_at_a_time
    def inner():
        inside.append(threading.get_ident())
        time.sleep(0.01)
        assert inside.pop() == threading.get_ident()
        return len(inside)

    @one_thread_at_a_time
    def outer(number):
        return number + inner()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(outer, range(12))) == list(range(12))


@pytest.mark.parametrize("function", [compare, fit, guide_draws, sample, to_datatree])
def test_public_functions_that_trace_models_are_such(function):
    assert function.__wrapped__.__name__ == function.__name__


@pytest.mark.slow
def test_two_threads_sample_as_one_does():
    """NumPyro's stack of handlers ended in AssertionError or IndexError."""

    def model(values):
        mean = numpyro.sample("mean", dist.Normal())
        for number in range(30):  # traced for longer than a thread runs at a time
            numpyro.sample(f"value_{number}", dist.Normal(mean), obs=values[number])

    def draws(number):
        config = SampleConfig(chains=1, warmup=4, draws=5, seed=number)
        result = sample(model, model_args=(np.arange(30.0),), config=config)
        return result.draws["mean"]

    alone = [draws(number) for number in range(3)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(draws, range(3)))
    np.testing.assert_array_equal(together, alone)
