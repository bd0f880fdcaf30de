"""Published models that are fitted on: the run, its resumption, its export, and refusals."""

import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from probattn.inference import (
    PriorConfig,
    RunConfig,
    TuneConfig,
    TuneFitConfig,
    compare,
    export_decoder,
    fit,
    generate,
    import_decoder,
    load_run,
    text_margins,
    to_datatree,
)
from probattn.inference.fitting import loop
from probattn.inference.runs.files import RunError
from probattn.inference.runs.run import TunedRun
from probattn.models import ObjectiveConfig
from probattn.models.decoder.shapes import leaves
from tests.support.tiny_decoder import imported
from tests.support.whole_fit import state_of

FIT = TuneFitConfig(
    steps=5,
    batch=4,
    learning_rate=0.03,
    eval_every=2,
    checkpoint_every=2,
    trainable="adapters",
    adapter_rank=2,
    gradient_accumulation=2,
)


@pytest.fixture(name="tuned", scope="module")
def tuned_fixture(tmp_path_factory, compiled_once):
    """A published model, a fit of its adapters, and the run as it was after two of five steps."""
    folder = tmp_path_factory.mktemp("tuned")
    base = imported(folder, "smollm").run
    config = TuneConfig(base.config.data, objective=ObjectiveConfig("ce"), fit=FIT)
    save, make, trainers = TunedRun.append_metrics, loop.Trainer, []

    def copied(self, row):
        save(self, row)
        if row["step"] == 4:  # before its checkpoint: that of step 2 is the last
            shutil.copytree(self.path, folder / "cut")

    def noted(*arguments):
        trainers.append(make(*arguments))
        return trainers[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TunedRun, "append_metrics", copied)
        patch.setattr(loop, "Trainer", noted)
        result = fit(config, folder / "run2", base=base.path)
    return SimpleNamespace(
        folder=folder,
        base=base,
        config=config,
        result=result,
        run=load_run(result.run.path),
        trainer=trainers[0],
    )


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_a_fit_moves_the_adapters_alone(tuned):
    """The optimizer has state of what moves, and the text is predicted better."""
    run, before = tuned.run, dict(leaves(tuned.base.parameters))
    changed = {
        name for name, value in leaves(run.parameters) if not np.array_equal(value, before[name])
    }
    assert changed == {
        f"layers.{layer}.{name}.weights" for layer in (0, 1) for name in ("query", "value")
    }
    assert run.sites.keys() == {f"{name}.{side}" for name in changed for side in ("down", "up")}
    rows = run.metrics()
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert rows[-1]["validation_cross_entropy"] < rows[0]["validation_cross_entropy"]
    assert rows[-1]["validation_cross_entropy"] == tuned.result.validation_cross_entropy
    assert rows[-1]["min_margin_kind"] == "reduced, first layer"
    stored = sum(path.stat().st_size for path in (run.path / "checkpoints").rglob("*"))
    whole = sum(path.stat().st_size for path in (tuned.base.path / "model").rglob("*"))
    assert run.summary()["fit"]["parameters"] == 2 * 2 * ((30 + 30) + (30 + 10))
    assert stored < 2 * whole


def test_a_fit_that_was_cut_off_ends_as_one_that_was_not(tuned):
    cut = load_run(tuned.folder / "cut")
    assert cut.latest.step == 2
    found = fit(tuned.config, cut.path, resume=True).run
    assert_equal(found.sites, tuned.run.sites)
    assert found.config == tuned.run.config
    for got, expected in zip(found.metrics(), tuned.run.metrics(), strict=True):
        assert got | {"tokens_per_s": 0} == expected | {"tokens_per_s": 0}
    assert_equal(state_of(found, tuned.trainer), state_of(tuned.run, tuned.trainer))


def test_an_exported_fit_is_the_same_network(tuned):
    folder = export_decoder(tuned.run, tuned.folder / "exported")
    written = json.loads((folder / "config.json").read_text())
    assert (written["dtype"], written["torch_dtype"]) == ("float32", "float32")
    again = import_decoder(folder, tuned.folder / "again", data=tuned.config.data, block=16).run
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16)
    logits = [
        run.network.logits(run.parameters, run.network.embed(run.parameters, tokens))
        for run in (tuned.run, again)
    ]
    # The fit was in double precision, as these tests are, and the folder is in single precision.
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-4)
    assert again.summary()["imported"]["cross_entropy"] == pytest.approx(
        tuned.result.validation_cross_entropy, rel=1e-6
    )


def test_a_model_that_has_changed_or_is_gone_is_named(tuned, tmp_path):
    run = load_run(shutil.copytree(tuned.run.path, tmp_path / "run"))
    base = shutil.copytree(tuned.base.path, tmp_path / "base")
    text = (run.path / "config.toml").read_text().replace(str(tuned.base.path), str(base))
    (run.path / "config.toml").write_text(text)
    config = load_run(run.path).config
    (base / "model/config.json").write_text(
        (base / "model/config.json").read_text().replace('"rope_theta": 100000', '"rope_theta": 9')
    )
    line = re.escape(f"{run.path}: was fitted from {base} with checksum")
    with pytest.raises(RunError, match=line):
        fit(config, run.path, resume=True)
    with pytest.raises(RunError, match=line):
        _ = load_run(run.path).parameters
    shutil.rmtree(base)
    with pytest.raises(RunError, match=r"which holds no imported model any more; put it back"):
        fit(config, run.path, resume=True)


def test_a_model_that_was_moved_is_found_or_named(tuned, tmp_path):
    """Beside the fit it is found; elsewhere its place is named once, and kept."""
    run = shutil.copytree(tuned.folder / "cut", tmp_path / "there/fit")
    gone = tmp_path / "gone" / tuned.base.path.name
    text = (run / "config.toml").read_text().replace(str(tuned.base.path), str(gone))
    (run / "config.toml").write_text(text)
    shutil.copytree(tuned.base.path, run.parent / gone.name)
    assert_equal(dict(leaves(load_run(run).base.parameters)), dict(leaves(tuned.base.parameters)))

    new = (run.parent / gone.name).rename(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=re.escape(f"--resume --out {run} --from PLACE")):
        load_run(run)
    other = import_decoder(new / "model", tmp_path / "other", data=tuned.config.data, block=8).run
    before = (run / "config.toml").read_text()
    with pytest.raises(RunError, match=r"in blocks of 16, and .*/other has \w+ and 8; name the"):
        fit(tuned.config, run, base=other.path, resume=True)
    changed = shutil.copytree(new, tmp_path / "changed")
    described = changed / "model/config.json"
    described.write_text(described.read_text().replace('"rope_theta": 100000', '"rope_theta": 9'))
    with pytest.raises(RunError, match="name the import that it began with"):
        fit(tuned.config, run, base=changed, resume=True)
    assert (run / "config.toml").read_text() == before
    found = fit(tuned.config, run, base=new, resume=True).run
    assert_equal(found.sites, tuned.run.sites)
    assert load_run(run).config.base == dataclasses.replace(tuned.run.config.base, run=str(new))


REFUSED = {
    "no base": (lambda t: (t.config, {}), "base is missing: expected the run of a published"),
    "a base for an own network": (
        lambda t: (RunConfig(), {"base": t.base.path}),
        "with a RunConfig, which describes a network: expected a TuneConfig",
    ),
    "a fitted base": (
        lambda t: (t.config, {"base": t.run.path}),
        "is no run of `probattn import`",
    ),
    "the base itself": (
        lambda t: (t.config, {"base": t.base.path, "out": t.base.path, "overwrite": True}),
        "is the run that the fit begins with: expected another directory",
    ),
    "devices": (lambda t: (t.config, {"base": t.base.path, "mesh": "data=1"}), "mesh is data=1"),
    "a large minibatch": (
        lambda t: (with_fit(t.config, batch=400), {"base": t.base.path}),
        "expected at least a minibatch of 400 blocks of 16",
    ),
    "another configuration": (
        lambda t: (with_fit(t.config, adapter_rank=3), {"resume": True}),
        "fit.adapter_rank: 2 -> 3",
    ),
}


def with_fit(config, **changes):
    return dataclasses.replace(config, fit=dataclasses.replace(config.fit, **changes))


@pytest.mark.parametrize("case", REFUSED)
def test_a_fit_refuses(tuned, tmp_path, case):
    make, line = REFUSED[case]
    config, options = make(tuned)
    out = options.pop("out", tuned.run.path if "resume" in options else tmp_path / "run")
    with pytest.raises(ValueError, match=re.escape(line)):
        fit(config, out, **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: TuneConfig(objective=ObjectiveConfig("full")), "objective.name is full"),
        (lambda: TuneConfig(prior=PriorConfig(-1.0)), "prior.scale is -1.0"),
        (lambda: TuneFitConfig(guide="mean_field"), "fit.guide is mean_field of a published model"),
        (lambda: TuneFitConfig(weight_decay=0.1), "fit.weight_decay is 0.1 of a published model"),
    ],
)
def test_a_configuration_refuses(make, line):
    with pytest.raises(ValueError, match=re.escape(line)):
        make()


@pytest.mark.slow
def test_all_parameters_move_under_the_barrier(tuned):
    """And the commands of any run take it: margins, text, the exported tree."""
    fast = dataclasses.replace(FIT, trainable="all", steps=4, gradient_accumulation=1)
    margin = ObjectiveConfig("margin", 50.0, attention="first_layer")
    config = dataclasses.replace(tuned.config, objective=margin, fit=fast)
    run = fit(config, tuned.folder / "all", base=tuned.base.path).run
    published = dict(leaves(tuned.base.parameters))
    assert run.sites.keys() == published.keys()
    assert all(not np.array_equal(value, published[name]) for name, value in run.sites.items())
    assert run.metrics()[-1]["mean_log_det"] > run.metrics()[0]["mean_log_det"]
    margins = text_margins(run)
    assert [stage.label for stage in margins.stages] == [f"layer 1 head {n}" for n in (1, 2, 3)]
    assert len(generate(run, "the token", length=3).tokens) == 3
    assert "margins" in to_datatree(run, sequences=2)
    before, after = compare({"before": tuned.base, "after": run})
    assert (before.model, after.model) == ("imported", "imported")
    assert after.predictions.bpc != before.predictions.bpc
    assert after.seconds > 0
    assert jax.tree.structure(run.parameters) == jax.tree.structure(tuned.base.parameters)
