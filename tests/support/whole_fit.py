"""A tiny fit from its first step to its last, and how others are compared with it."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probattn.inference import RunConfig, fit, load_run
from probattn.inference.fitting import loop
from probattn.inference.fitting.result import FitResult
from probattn.inference.fitting.sharding import Placement
from probattn.inference.fitting.svi import Trainer
from probattn.inference.runs.checkpoints import named_leaves
from probattn.inference.runs.run import Run
from probattn.models import ObjectiveConfig
from probattn.text.corpora import DataConfig
from tests.support.tiny_run import FIT, MODEL, files_of, shared_folder, tiny_text

REPORTS = [80, 160, 200]
SCHEDULE = dataclasses.replace(FIT, eval_every=80, checkpoint_every=60)


def fit_whole(tmp_path_factory):
    """Fit once for all workers of a session: the result, its trainer, and copies on the way."""
    folder = shared_folder(tmp_path_factory) / "whole"
    source = DataConfig(str(folder / "corpus.txt"))
    config = RunConfig(source, MODEL, ObjectiveConfig("margin"), SCHEDULE)
    with filelock.FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            (folder / "corpus.txt").write_text(tiny_text(), encoding="utf-8")
            _fit_and_record(config, folder)
    run = load_run(folder / "run")
    tokens = jnp.asarray(run.vocabulary.encode(tiny_text()[:3600]))
    with np.load(folder / "start.npz") as start:
        return SimpleNamespace(
            config=config,
            result=FitResult(run, **json.loads((folder / "result.json").read_text("utf-8"))),
            run=run,
            copies={step: folder / f"line-{step}" for step in REPORTS},
            start=dict(start),
            trainer=loop.Trainer(config, tokens, run.vocabulary.size, None, Placement(batch=4)),
        )


def _fit_and_record(config, folder):
    starts, advance, append = [], Trainer.advance, Run.append_metrics

    def recording_advance(self, state, step, stop):
        if step == 0:
            starts.append(jax.tree.map(np.array, self.guide.median(self.guide_params(state))))
        return advance(self, state, step, stop)

    def recording_append(self, row):
        append(self, row)
        shutil.copytree(self.path, folder / f"line-{row['step']}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "advance", recording_advance)
        patch.setattr(Run, "append_metrics", recording_append)
        result = fit(config, folder / "run")
    np.savez(folder / "start.npz", **starts[0])
    parts = {name: value for name, value in vars(result).items() if name != "run"}
    (folder / "result.json").write_text(json.dumps(parts), "utf-8")


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
