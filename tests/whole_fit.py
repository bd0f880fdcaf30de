"""A tiny fit from its first step to its last, and how others are compared with it."""

import dataclasses
import importlib
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_run import (
    FIT,
    files_of,
    tiny_config,
)

from probattn.inference import fit
from probattn.inference.checkpoints import named_leaves
from probattn.inference.runs import Run
from probattn.inference.svi import Trainer

LOOP = importlib.import_module("probattn.inference.fit")  # the package's attribute is the function
REPORTS = [80, 160, 200]


@pytest.fixture(name="config", scope="module")
def config_fixture(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("text"))
    schedule = dataclasses.replace(FIT, eval_every=80, checkpoint_every=60)
    return dataclasses.replace(config, fit=schedule)


@pytest.fixture(name="whole", scope="module")
def whole_fixture(config, tmp_path_factory):
    """A fit from its first step to its last, with copies of the run made on the way."""
    folder = tmp_path_factory.mktemp("whole")
    copies, starts, trainers = {}, [], []
    advance, append = Trainer.advance, Run.append_metrics

    def recording_advance(self, state, step, stop):
        if step == 0:
            trainers.append(self)
            starts.append(jax.tree.map(np.array, self.parameters(state)))
        return advance(self, state, step, stop)

    def recording_append(self, row):
        append(self, row)
        copies[row["step"]] = shutil.copytree(self.path, folder / f"line-{row['step']}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "advance", recording_advance)
        patch.setattr(Run, "append_metrics", recording_append)
        result = fit(config, folder / "run")
    return SimpleNamespace(
        result=result, run=result.run, copies=copies, start=starts[0], trainer=trainers[0]
    )


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
