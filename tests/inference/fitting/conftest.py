"""A tiny fit from its first step to its last, which the tests of fits share."""

import dataclasses
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from probattn.inference import fit
from probattn.inference.fitting.svi import Trainer
from probattn.inference.runs.run import Run
from tests.support.tiny_run import FIT, tiny_config


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
            starts.append(jax.tree.map(np.array, self.guide.median(self.guide_params(state))))
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
