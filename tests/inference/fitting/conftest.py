"""What the tests of fits share: compiled steps, and a tiny fit from its first step to its last."""

import dataclasses

import numpy as np
import pytest

from probattn.inference.fitting import loop, reports
from probattn.inference.fitting.monitor import Monitor
from probattn.inference.fitting.svi import Trainer
from probattn.text.corpora import DataConfig
from tests.support.whole_fit import fit_whole

TRAINERS, MONITORS = {}, {}


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Fits of one configuration share a trainer and a monitor, which hold no state of a fit.

    Each would trace and compile the same programs again. A fit with an optimizer of its own, or on
    several devices, makes its own.
    """

    def trainer(config, tokens, size, optimizer, placement, base=None):
        arguments = config, tokens, size, optimizer, placement, base
        if optimizer is not None or placement.mesh is not None:
            return Trainer(*arguments)
        key = same_program(config), np.asarray(tokens).tobytes(), size
        if key not in TRAINERS:
            TRAINERS[key] = Trainer(*arguments)
        return TRAINERS[key]

    def monitor(config, inputs):
        key = config.model, config.objective, inputs.tobytes()
        if key not in MONITORS:
            MONITORS[key] = Monitor(config, inputs)
        return MONITORS[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Trainer", trainer)
        patch.setattr(reports, "Monitor", monitor)
        yield


def same_program(config):
    """The configuration without what no step depends on."""
    schedule = {"eval_every": 1, "checkpoint_every": 1, "evaluation_tokens": None}
    return dataclasses.replace(
        config, data=DataConfig(), fit=dataclasses.replace(config.fit, **schedule)
    )


@pytest.fixture(name="whole", scope="module")
def whole_fixture(tmp_path_factory):
    """A fit from its first step to its last, with copies of the run made on the way."""
    return fit_whole(tmp_path_factory)


@pytest.fixture(name="config", scope="module")
def config_fixture(whole):
    return whole.config
