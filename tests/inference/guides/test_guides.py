"""Guides other than MAP: what they fit, what they leave in a run, and the draws from them."""

import dataclasses
import math
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from probattn.inference import FitConfig, LaplaceError, fit, guide_draws, load_run
from probattn.inference.cli import commands, main
from probattn.inference.fitting import loop
from probattn.inference.fitting.sharding import Placement
from probattn.inference.fitting.svi import Trainer
from probattn.inference.guides import guide_draws as drawing
from probattn.inference.runs.checkpoints import CheckpointError, CheckpointFolder, named_leaves
from probattn.inference.runs.run import Run
from tests.support.guide_runs import (
    BLOCK,
    FIT,
    MODEL,
    SURE,
    assert_standard,
    config_of,
    flat,
    objective,
    training_text,
)
from tests.support.refusals import refusal
from tests.support.tiny_run import copy_of, files_of

DRAWS = 20_000


# The barrier triples what a guide takes to compile.
# Where a fit of ce ends depends on the processor, and is not always a mode.
objectives = [pytest.param("margin", marks=pytest.mark.slow)]
slow_objectives = [pytest.param("ce", marks=pytest.mark.nightly), *objectives]


@pytest.fixture(scope="module", params=objectives)
def laplace(request, folder):
    """A run, its draws, and the Hessian that was taken for them."""
    run = fit(config_of(folder, "laplace", request.param), folder / f"laplace-{request.param}").run
    taken = []

    def noting(prior_loss, z, **options):
        matrix = hessian(prior_loss, z, **options)
        taken.append((z, matrix))
        return matrix

    hessian = drawing.hessian
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "hessian", noting)
        draws = guide_draws(run, draws=DRAWS, seed=1)
    assert len(taken) == 1
    return SimpleNamespace(run=run, draws=draws, z=taken[0][0], hessian=taken[0][1])


@pytest.fixture(scope="module", params=["mean_field", pytest.param("ivon", marks=pytest.mark.slow)])
def mean_field(request, folder):
    """A run with a copy of it as a kill would leave it. Objective ce, for a shorter compilation.

    The guide ivon is the same family, found in another way.
    """
    append, copies, guide = Run.append_metrics, [], request.param

    def recording(self, row):
        append(self, row)
        copies.append(shutil.copytree(self.path, folder / f"killed-{guide}-{row['step']}"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "append_metrics", recording)
        run = fit(config_of(folder, guide, "ce"), folder / guide).run
    return SimpleNamespace(run=run, killed=copies[0])


@pytest.fixture(scope="module")
def trainer(mean_field):
    """A trainer like the run's own."""
    tokens = mean_field.run.vocabulary.encode(training_text(mean_field.run))
    arguments = mean_field.run.config, jnp.asarray(tokens), 3, None, Placement(batch=FIT.batch)
    return loop.Trainer(*arguments)


@pytest.fixture(scope="module", params=slow_objectives)
def low_rank(request, folder):
    # Of fewer steps some seeds, others on other processors, would stay near the prior.
    config = config_of(folder, "low_rank", request.param, steps=1000)
    return fit(config, folder / f"low_rank-{request.param}").run


def guide_part(run, **shapes):
    like = {name: jax.ShapeDtypeStruct(shape, jnp.float64) for name, shape in shapes.items()}
    return {name: np.asarray(leaf) for name, leaf in run.best.load(like, part="guide").items()}


def mean_field_params(run):
    parts = ("loc", "scale")
    shapes = {f"{n}_auto_{part}": v.shape for n, v in run.parameters.items() for part in parts}
    return guide_part(run, **shapes)


@pytest.fixture(scope="module")
def curvature(laplace):
    """Hessian of the objective by hand, in vectors of all sites in the order of their names.

    Central differences of the gradient, of fourth order since some curvatures change within a
    thousandth: good to about nine digits of the largest entry.
    """
    _, unravel = ravel_pytree(dict(sorted(laplace.run.parameters.items())))
    loss, step = objective(laplace.run), 1e-6
    gradient = jax.jit(jax.grad(lambda z: loss(unravel(z))))

    def differences(z):
        def slope(move):
            one, two = (gradient(z + n * move) - gradient(z - n * move) for n in (1, 2))
            return (8 * one - two) / (12 * step)

        return np.stack([slope(move) for move in step * np.eye(len(z))])

    return differences


# Laplace


@pytest.mark.slow
def test_laplace_ends_where_map_does(laplace, folder):
    config = config_of(folder, "map", laplace.run.config.objective.name)
    tokens = laplace.run.vocabulary.encode(training_text(laplace.run))
    trainer = Trainer(config, jnp.asarray(tokens), 3)
    state, _ = trainer.advance(trainer.init(), 0, 400)
    assert laplace.run.step == 400
    for name, value in trainer.guide.median(trainer.guide_params(state)).items():
        np.testing.assert_allclose(laplace.run.parameters[name], value, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_the_precision_is_the_hessian_of_the_whole_objective(laplace, curvature):
    point = flat(laplace.run.parameters)
    np.testing.assert_array_equal(laplace.z, point)
    expected = curvature(point)
    assert np.linalg.eigvalsh(expected)[0] > 0
    np.testing.assert_allclose(laplace.hessian, expected, rtol=0, atol=1e-8 * expected.max())


@pytest.mark.slow
def test_draws_of_laplace_have_the_inverse_hessian_as_covariance(laplace, curvature):
    point = flat(laplace.run.parameters)
    factor = np.linalg.cholesky(curvature(point))
    assert_standard((flat(laplace.draws, 2)[0] - point) @ factor)


@pytest.mark.slow
def test_a_point_that_is_no_mode_has_no_draws(laplace, curvature, tmp_path):
    saddle = {
        name: jnp.asarray(np.random.default_rng(0).normal(size=value.shape) / 3 + ("norm" in name))
        for name, value in laplace.run.parameters.items()
    }
    eigenvalues = np.linalg.eigvalsh(curvature(flat(saddle)))
    assert eigenvalues[0] < -1
    run = copy_of(laplace.run, tmp_path / "saddle")
    run.best.save(401, saddle)
    message = refusal(LaplaceError, guide_draws, run, draws=5)
    assert message.startswith(f"{run.path}: the parameters of step 401 are no mode: ")
    assert f"{(eigenvalues <= 0).sum()} of the {len(eigenvalues)} eigenvalues" in message
    assert f"the smallest is {eigenvalues[0]:.3g}; fit it longer" in message


def test_a_model_too_large_for_laplace_is_refused_before_anything_is_done(
    laplace, folder, tmp_path
):
    large = dataclasses.replace(MODEL, width=32, heads=1)
    config = dataclasses.replace(config_of(folder, "laplace"), model=large)
    # Tables, norms, attention, MLP, attention stage.
    size = (3 + BLOCK) * 32 + 3 * 32 + 4 * 32**2 + 8 * 32**2 + 2 * 32
    message = refusal(ValueError, fit, config, tmp_path / "run")
    assert message == (
        f"fit.guide is laplace and the model has {size:,} parameters: expected at most 10,000, "
        "since their Hessian is dense; give a smaller model, or mean_field, ivon or low_rank"
    )
    assert not (tmp_path / "run").exists()
    (tmp_path / "old").mkdir()
    shutil.copy(laplace.run.path / "config.toml", tmp_path / "old")
    before = files_of(tmp_path)
    refusal(ValueError, fit, config, tmp_path / "old", overwrite=True)
    assert files_of(tmp_path) == before


# Mean field and low rank


def test_draws_of_mean_field_have_its_means_and_scales(mean_field):
    run = mean_field.run
    shapes = {name: value.shape for name, value in run.parameters.items()}
    params = mean_field_params(run)
    draws = guide_draws(run, draws=DRAWS)
    assert draws.keys() == run.parameters.keys()
    for name, shape in shapes.items():
        assert draws[name].shape == (1, DRAWS, *shape)
        np.testing.assert_array_equal(params[f"{name}_auto_loc"], run.parameters[name])
    location = flat({name: params[f"{name}_auto_loc"] for name in shapes})
    scale = flat({name: params[f"{name}_auto_scale"] for name in shapes})
    assert scale.max() > 3 * scale.min()  # it has learned what the text tells
    assert_standard((flat(draws, 2)[0] - location) / scale)


def test_draws_of_low_rank_have_its_covariance(low_rank):
    size = sum(value.size for value in low_rank.parameters.values())
    params = guide_part(low_rank, auto_loc=(size,), auto_scale=(size,), auto_cov_factor=(size, 10))
    np.testing.assert_array_equal(params["auto_loc"], flat(low_rank.parameters))
    factor = params["auto_scale"][:, None] * params["auto_cov_factor"]
    covariance = np.diag(params["auto_scale"] ** 2) + factor @ factor.T
    deviation = np.sqrt(np.diag(covariance))
    correlation = covariance / np.outer(deviation, deviation) - np.eye(size)
    assert np.abs(correlation).max() > 0.3  # not a mean field by another name
    draws = flat(guide_draws(low_rank, draws=DRAWS), 2)[0] - params["auto_loc"]
    assert_standard(np.linalg.solve(np.linalg.cholesky(covariance), draws.T).T)


def assert_one_point(run, guide):
    run = load_run(run.path)
    shapes = {name: shape.shape for name, shape in run.parameter_shapes().items()}
    assert {name: value.shape for name, value in run.parameters.items()} == shapes
    assert run.summary()["fit"]["inference"] == guide
    assert run.summary()["fit"]["validation_bpc"] < math.log2(3) - 0.03


def test_a_run_of_any_guide_has_one_point_of_parameters(laplace, folder, tmp_path):
    assert_one_point(laplace.run, "laplace")
    config = config_of(folder, "mean_field", "ce", steps=1000)  # as many as of low rank
    assert_one_point(fit(config, tmp_path / "run").run, "mean_field")


def test_a_run_of_low_rank_has_one_point_of_parameters(low_rank):
    assert_one_point(low_rank, "low_rank")


@pytest.mark.slow
@pytest.mark.parametrize("mean_field", ["mean_field"], indirect=True)
def test_the_loss_is_minus_the_elbo_per_token(mean_field, trainer):
    """At the start, where the guide is so narrow that the log joint is that of its centre."""
    state = trainer.init()
    params = trainer.guide_params(state)
    point = trainer.guide.median(params)
    entropy = sum(
        np.sum(np.log(value) + np.log(2 * math.pi * math.e) / 2)
        for name, value in params.items()
        if name.endswith("_scale")
    )
    expected = (float(jax.jit(objective(mean_field.run))(point)) - entropy) / 1800
    losses = []
    for step in range(400):
        state = trainer.init()
        svi = state.svi._replace(rng_key=jax.random.key(step))
        _, progress = trainer.advance(state._replace(svi=svi), step, step + 1)
        losses.append(float(progress.loss))
    assert abs(entropy / 1800) > 0.1
    assert np.mean(losses) == pytest.approx(expected, abs=SURE * np.std(losses) / 20)
    assert np.std(losses) / 20 < 0.005


def stored(run, trainer):
    """Everything that a run has saved, but for how long its steps took."""
    state = trainer.init()
    plain = state._replace(svi=state.svi._replace(rng_key=jax.random.key_data(state.svi.rng_key)))
    return {
        **run.latest.load(named_leaves(plain)),
        **run.best.load(trainer.guide_params(state), part="guide"),
        **run.parameters,
    }, [dict(row, tokens_per_s=None) for row in run.metrics()]


def test_a_fit_that_was_killed_goes_on_to_the_same_guide(mean_field, trainer, tmp_path):
    """Killed after its last report and before its last checkpoint."""
    killed = load_run(shutil.copytree(mean_field.killed, tmp_path / "run"))
    assert (killed.latest.step, killed.step, killed.metrics()[-1]["step"]) == (100, None, 200)
    run = fit(mean_field.run.config, killed.path, resume=True).run
    assert (run.step, run.summary()) == (mean_field.run.step, mean_field.run.summary())
    arrays, rows = stored(run, trainer)
    expected, expected_rows = stored(mean_field.run, trainer)
    assert rows == expected_rows
    for name, value in expected.items():
        np.testing.assert_array_equal(arrays[name], value, err_msg=name)


# Draws


def assert_draws_of_seed_1(run, first, monkeypatch):
    """Draws of the seed 1 begin with the same ones, however many are made at once."""
    monkeypatch.setattr(drawing, "VALUES", 200)  # two draws at once
    again, other = (guide_draws(run, draws=5, seed=seed) for seed in (1, 2))
    for name, value in first.items():
        assert value.dtype == run.parameters[name].dtype
        np.testing.assert_allclose(again[name], value[:, :5], rtol=1e-12, atol=1e-12)
        assert not np.isclose(other[name], value[:, :5]).any()


def test_draws_of_low_rank_are_functions_of_the_seed(low_rank, monkeypatch):
    assert_draws_of_seed_1(low_rank, guide_draws(low_rank, draws=7, seed=1), monkeypatch)


@pytest.mark.slow
def test_draws_of_laplace_are_functions_of_the_seed(laplace, monkeypatch):
    monkeypatch.setattr(drawing, "hessian", lambda *_, **__: laplace.hessian)
    assert_draws_of_seed_1(laplace.run, laplace.draws, monkeypatch)


def test_map_has_no_draws(laplace):
    fitted = dataclasses.replace(laplace.run.config.fit, guide="map")
    config = dataclasses.replace(laplace.run.config, fit=fitted)
    message = refusal(ValueError, guide_draws, dataclasses.replace(laplace.run, config=config))
    assert message.startswith(f"{laplace.run.path}: is a MAP run, a point estimate without draws; ")
    assert "probattn fit --guide mean_field" in message
    assert "probattn sample" in message


@pytest.mark.parametrize("draws", [0, -1, 2.5, True])
def test_draws_that_cannot_be_made(mean_field, draws):
    message = refusal(ValueError, guide_draws, mean_field.run, draws=draws)
    assert message == f"draws: got {draws}, expected an integer >= 1"


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_makes_no_key(mean_field, seed):
    assert f"seed: got {seed}, expected" in refusal(
        ValueError, guide_draws, mean_field.run, seed=seed
    )


# Checkpoints


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_damaged_guide_is_refused_and_its_point_is_not(mean_field, tmp_path, damage):
    run = copy_of(mean_field.run, tmp_path / "run")
    part = run.path / "checkpoints" / "best" / str(run.step) / "guide"
    if damage == "missing":
        shutil.rmtree(part)
    else:
        file = max(part.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
        file.write_bytes(file.read_bytes()[:-1])
    message = refusal(CheckpointError, guide_draws, run)
    assert message.startswith(f"{part.parent}: the checkpoint is damaged")
    assert "checksums: guide/" in message
    np.testing.assert_array_equal(flat(run.parameters), flat(mean_field.run.parameters))


def test_a_guide_around_another_point_is_refused(mean_field, tmp_path):
    run = copy_of(mean_field.run, tmp_path / "run")
    params, name = mean_field_params(mean_field.run), "mlp_in_auto_loc"
    guide = params | {name: params[name][..., ::-1]}
    run.best.save(401, mean_field.run.parameters, guide=guide)
    message = refusal(CheckpointError, guide_draws, run)
    assert message.startswith(f"{run.path}: the guide of step 401 is not centred at the run's ")


def test_a_vector_of_another_order_is_refused(low_rank, tmp_path):
    run = copy_of(low_rank, tmp_path / "run")
    size = flat(low_rank.parameters).size
    params = guide_part(run, auto_loc=(size,), auto_scale=(size,), auto_cov_factor=(size, 10))
    run.best.save(401, low_rank.parameters, guide=params | {"auto_loc": params["auto_loc"][::-1]})
    message = refusal(CheckpointError, guide_draws, run)
    assert message.startswith(f"{run.path}: the guide of step 401 is not centred at the run's ")


def test_a_fit_that_went_on_since_is_no_other_run(mean_field, tmp_path):
    """Parameters and their step are those of one time, and so is what is made of both."""
    run = copy_of(mean_field.run, tmp_path / "run")
    before, step, guide = run.parameters, run.step, mean_field_params(run)
    run.best.save(step + 1, {name: value + 1 for name, value in before.items()}, guide=guide)
    assert (run.step, run.best.step) == (step, step + 1)
    assert flat(run.parameters).tolist() == flat(before).tolist()
    message = refusal(CheckpointError, guide_draws, run)
    assert f"the fit has gone on to step {step + 1} since" in message


def test_the_parts_of_a_checkpoint_are_saved_together_or_not_at_all(tmp_path):
    folder, ones, gone = CheckpointFolder(tmp_path), {"a": jnp.ones(2)}, jnp.ones(2)
    folder.save(1, ones, guide={"b": jnp.zeros(3)})
    gone.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        folder.save(2, {"a": jnp.zeros(2)}, guide={"b": gone})
    assert folder.step == 1
    np.testing.assert_array_equal(folder.load(ones)["a"], 1)
    np.testing.assert_array_equal(folder.load({"b": jnp.ones(3)}, part="guide")["b"], 0)


def test_a_scale_that_is_not_finite_is_not_saved(mean_field, tmp_path, monkeypatch):
    advance = Trainer.advance

    def spoiling(self, state, step, stop):
        state, progress = advance(self, state, step, stop)
        if stop == 200:  # where the next thing to do is a report
            count, (params, moments) = state.svi.optim_state
            name = "mlp_in_auto_scale"
            params = params | {name: jnp.full_like(params[name], jnp.nan)}
            svi = state.svi._replace(optim_state=(count, (params, moments)))
            state = state._replace(svi=svi)
        return state, progress

    monkeypatch.setattr(Trainer, "advance", spoiling)
    run = load_run(shutil.copytree(mean_field.killed, tmp_path / "run"))
    message = refusal(RuntimeError, fit, mean_field.run.config, run.path, resume=True)
    assert "the fit stopped at step 200: the parameters are not finite; " in message
    assert (run.latest.step, run.step) == (100, None)


# Configuration


def test_the_short_flag_is_the_field(monkeypatch, tmp_path, capsys):
    calls = []
    result = SimpleNamespace(
        validation_bpc=2.5,
        validation_cross_entropy=1.75,
        run=SimpleNamespace(step=8),
        table_certificate=None,
    )
    monkeypatch.setattr(commands, "fit", lambda config, *_, **__: calls.append(config) or result)
    for flags in (["--guide", "low_rank"], ["--guide=low_rank"], ["--fit.guide", "low_rank"], []):
        assert main(["fit", "--out", str(tmp_path / "run"), *flags]) == 0
    assert [config.fit.guide for config in calls] == ["low_rank"] * 3 + ["map"]
    assert main(["fit", "--out", str(tmp_path / "run"), "--guide", "delta"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "low_rank" in line


def test_an_unknown_guide_is_refused():
    with pytest.raises(ValueError, match=r"fit.guide is 'delta': expected one of map, laplace, "):
        FitConfig(guide="delta")
