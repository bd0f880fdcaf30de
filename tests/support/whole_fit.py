"""A tiny fit from its first step to its last, and how others are compared with it."""

import dataclasses

import jax
import numpy as np

from probattn.inference.runs.checkpoints import named_leaves
from tests.support.tiny_run import files_of

REPORTS = [80, 160, 200]


def state_of(run, trainer):
    """Everything that the latest checkpoint holds."""

    def plain():
        state = trainer.init()
        return state._replace(
            svi=state.svi._replace(rng_key=jax.random.key_data(state.svi.rng_key))
        )

    return run.latest.load(named_leaves(jax.eval_shape(plain)))


def rows_of(run):
    return [dict(row, tokens_per_s=None) for row in run.metrics()]


def assert_same_outcome(run, whole):
    """To the last bit, but for how long it took."""
    for got, expected in (
        (state_of(run, whole.trainer), state_of(whole.run, whole.trainer)),
        (run.parameters, whole.run.parameters),
    ):
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(got[name], value, err_msg=name)
    assert (run.step, run.latest.step) == (whole.run.step, whole.run.latest.step)
    assert rows_of(run) == rows_of(whole.run)
    assert run.summary() == whole.run.summary()
    assert files_of(run.path).keys() - checkpoint_files(run) == {
        "config.toml",
        "data.json",
        "metrics.jsonl",
        "summary.json",
    }


def checkpoint_files(run):
    return {name for name in files_of(run.path) if name.startswith("checkpoints/")}


def with_data(config, **data):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **data))


def with_fit(config, **changes):
    return dataclasses.replace(config, fit=dataclasses.replace(config.fit, **changes))
