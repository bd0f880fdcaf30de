"""Last-layer Laplace: its precision, its draws, and what they predict."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probattn.inference import fit, guide_draws, to_datatree
from probattn.inference.comparison.predictive import predictions
from probattn.inference.fitting.svi import Trainer
from probattn.inference.guides import guide_draws as drawing
from probattn.inference.guides import last_layer as module
from probattn.inference.guides.laplace import text_batches
from probattn.models import ObjectiveConfig
from probattn.models.language import parameter_shapes
from tests.support.guide_runs import (
    BLOCK,
    MODEL,
    assert_standard,
    block_chances,
    block_loss,
    config_of,
    tiny_text,
    training_text,
)
from tests.support.refusals import refusal

DRAWS = 20_000
OUTPUT = "output_embedding"


@pytest.fixture(scope="module", params=[pytest.param("ce", marks=pytest.mark.slow)])
def last_layer(request, folder):
    run = fit(config_of(folder, "last_layer", request.param), folder / "last_layer").run
    return SimpleNamespace(run=run, draws=guide_draws(run, draws=DRAWS, seed=1))


def precision(point, tokens):
    """Hessian of minus the log joint in the output's table, by automatic differentiation."""
    point = {name: jnp.asarray(value) for name, value in point.items()}
    blocks = np.stack([tokens[i : i + BLOCK + 1] for i in range(len(tokens) - BLOCK)])
    sequences = len(tokens) / BLOCK

    def loss(table):
        p = point | {OUTPUT: table}
        prior = jnp.sum(table**2) / (3 * 0.05) ** 2 / 2
        of_block = jax.vmap(lambda block: block_loss(p, block))
        return sequences * jnp.mean(of_block(blocks)) + prior

    table = point["token_embedding"]
    return np.asarray(jax.hessian(loss)(table)).reshape(table.size, table.size)


def test_the_precision_is_the_hessian_of_the_log_joint_in_the_table():
    rng = np.random.default_rng(2)
    shapes = parameter_shapes(3, MODEL, ObjectiveConfig("ce"))
    point = {
        name: jnp.asarray(rng.normal(size=leaf.shape) + ("norm" in name))
        for name, leaf in shapes.items()
    }
    tokens = rng.integers(0, 3, 600)
    found = module.last_layer(MODEL, point, tokens)
    np.testing.assert_array_equal(found.mean, point["token_embedding"])
    factor, expected = np.asarray(found.factor), precision(point, tokens)
    assert np.abs(expected - np.diag(np.diag(expected))).max() > 10
    np.testing.assert_allclose(factor @ factor.T, expected, rtol=0, atol=1e-12 * expected.max())


def test_draws_have_the_inverse_precision_as_covariance(last_layer):
    run = last_layer.run
    tokens = run.vocabulary.encode(training_text(run))
    changes = last_layer.draws[OUTPUT][0] - np.asarray(run.parameters["token_embedding"])
    factor = np.linalg.cholesky(precision(run.parameters, tokens))
    assert_standard(changes.reshape(DRAWS, -1) @ factor)


def test_draws_move_the_output_alone(last_layer):
    point = last_layer.run.parameters
    assert last_layer.draws.keys() == {*point, OUTPUT}
    for name, value in point.items():
        assert last_layer.draws[name].shape == (1, DRAWS, *value.shape)
        assert (last_layer.draws[name][0] == np.asarray(value)).all()


def test_draws_are_functions_of_the_seed(last_layer, monkeypatch):
    monkeypatch.setattr(drawing, "VALUES", 12)  # two draws at once
    again, other = (guide_draws(last_layer.run, draws=5, seed=seed)[OUTPUT] for seed in (1, 2))
    first = last_layer.draws[OUTPUT][:, :5]
    assert again.dtype == last_layer.run.parameters["token_embedding"].dtype
    np.testing.assert_allclose(again, first, rtol=1e-12, atol=1e-12)
    assert not np.isclose(other, first).any()


def test_it_ends_where_map_does(last_layer, folder):
    """To the last bit: it is the same fit."""
    config = config_of(folder, "map", "ce")
    tokens = last_layer.run.vocabulary.encode(training_text(last_layer.run))
    trainer = Trainer(config, jnp.asarray(tokens), 3)
    state, _ = trainer.advance(trainer.init(), 0, last_layer.run.step)
    assert last_layer.run.summary()["fit"]["inference"] == "last_layer"
    for name, value in trainer.guide.median(trainer.guide_params(state)).items():
        np.testing.assert_array_equal(last_layer.run.parameters[name], value)


def by_hand(members, held_out):
    """Mean log probability of the held-out tokens, and mean confidence, of an ensemble."""
    count = len(held_out) - 1
    starts = np.minimum(np.arange(0, count, BLOCK), count - BLOCK)
    new = np.arange(count) // BLOCK, np.arange(count) - starts[np.arange(count) // BLOCK]
    chances = 0
    for p in members:
        of_blocks = jax.vmap(block_chances, in_axes=(None, 0))
        blocks = np.stack([held_out[start : start + BLOCK] for start in starts])
        of_all = of_blocks({name: jnp.asarray(value) for name, value in p.items()}, blocks)
        chances += np.asarray(of_all)[new] / len(members)
    target = np.take_along_axis(chances, held_out[1:, None], -1)
    return np.log(target).mean(), chances.max(-1).mean()


def test_predictions_are_means_over_tables_of_the_output(last_layer):
    run = last_layer.run
    held_out = run.vocabulary.encode(tiny_text()[1800:])
    point = {name: np.asarray(value) for name, value in run.parameters.items()}
    members = {name: value[0, :8] for name, value in last_layer.draws.items()}
    found = predictions(run.vocabulary, run.network, members, held_out, seed=0)
    expected, _ = by_hand(
        [{name: value[i] for name, value in members.items()} for i in range(8)], held_out
    )
    assert found.log_predictive_density == pytest.approx(expected, abs=1e-6)
    at_point, _ = by_hand([point], held_out)
    assert abs(expected - at_point) > 1e-4  # not the MAP's by another name


def test_averaged_chances_are_off_the_point_by_half_the_curvature(last_layer):
    """E p(W) - p is tr(S H_p) / 2 to second order, with the covariance S of the draws.

    Both without the linear term, whose mean is zero. The next term is smaller by a factor of the
    order of the logits' variance.
    """
    run = last_layer.run
    point = {name: jnp.asarray(value) for name, value in run.parameters.items()}
    tokens = run.vocabulary.encode(training_text(run))
    block, table = jnp.asarray(tokens[:BLOCK]), point["token_embedding"]

    def chances(table):
        return block_chances(point | {OUTPUT: table}, block).ravel()

    size = table.size
    covariance = np.linalg.inv(precision(run.parameters, tokens))
    second = jax.hessian(chances)(table).reshape(-1, size, size)
    expected = np.einsum("kij,ij->k", second, covariance) / 2
    slope = jax.jacobian(chances)(table).reshape(-1, size)
    changes = (last_layer.draws[OUTPUT][0] - np.asarray(table)).reshape(DRAWS, size)
    moved = jax.jit(jax.vmap(chances))(jnp.asarray(last_layer.draws[OUTPUT][0]))
    found = np.asarray(moved) - np.asarray(chances(table)) - changes @ np.asarray(slope).T
    largest = np.abs(expected).max()
    assert largest > 50 * found.std(0).max() / np.sqrt(DRAWS)
    np.testing.assert_allclose(found.mean(0), expected, rtol=0, atol=0.1 * largest)


def test_a_tree_has_the_table_and_its_log_likelihoods(last_layer):
    run = last_layer.run
    tree = to_datatree(run, draws=4, seed=1, sequences=6, log_likelihood=True)
    table = tree["posterior"][OUTPUT]
    assert table.dims == ("chain", "draw", "vocab", "embed")
    np.testing.assert_allclose(table.values, last_layer.draws[OUTPUT][:, :4])
    text = run.vocabulary.encode(training_text(run))
    np.testing.assert_array_equal(tree["observed_data"]["tokens"].values[0], text[1 : BLOCK + 1])
    for draw in range(4):
        p = {name: value[0, draw] for name, value in last_layer.draws.items()}
        expected = -float(block_loss(p, text[: BLOCK + 1]))
        found = tree["log_likelihood"]["tokens"].values[0, draw, 0]
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_long_text_counts_as_much_by_fewer_blocks():
    tokens = np.random.default_rng(0).integers(0, 3, 5000)
    for most in (None, 1000):
        inputs, _, weights = text_batches(tokens, BLOCK, most_tokens=most)
        assert weights.sum() == pytest.approx(5000 / BLOCK)
        assert most is None or np.sum(weights > 0) * BLOCK <= most
        assert inputs.shape == (*weights.shape, BLOCK)


def test_a_table_too_large_is_refused_before_anything_is_done(folder, tmp_path):
    large = dataclasses.replace(MODEL, width=3334)
    config = dataclasses.replace(config_of(folder, "last_layer"), model=large)
    message = refusal(ValueError, fit, config, tmp_path / "run")
    assert message == (
        "fit.guide is last_layer and the output's table has 10,002 parameters: expected at most "
        "10,000, since their Hessian is dense; give a smaller model, or mean_field, ivon or "
        "low_rank"
    )
    assert not (tmp_path / "run").exists()
