"""Objective latent: its bound against one written by hand, NumPyro on the pair, and a whole fit."""

import dataclasses
import math
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpyro import handlers
from numpyro.infer import SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta
from numpyro.infer.initialization import init_to_value
from scipy.special import log_softmax
from scipy.stats import norm

from probattn import _reference as reference
from probattn import is_proper
from probattn.inference import fit, load_run
from probattn.inference.evaluation.attention_stages import stages
from probattn.inference.export.layout import DIMS
from probattn.inference.fitting.latent_metrics import latent_metrics
from probattn.inference.fitting.svi import Trainer
from probattn.models import ObjectiveConfig, language_model, latent_guide, transformer
from probattn.models.language import latent_process, parameter_shapes, sample_parameters
from probattn.models.transformer import embed
from tests.support.tiny_run import BLOCK, FIT, MODEL, RANK, WIDTH, tiny_config, tiny_text
from tests.support.tiny_trainer import STATE, draw, log_prior, state_at

BETA, SCALE = 0.3, 0.6
OBJECTIVE = ObjectiveConfig("latent", beta=BETA, guide_scale=SCALE, learn_guide_scale=True)
SEQUENCES = 3600 // BLOCK
STEPS = 20
logits = jax.jit(transformer.logits, static_argnames="heads")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A fit and its trainer, which is compiled once for all tests."""
    trainers, advance = [], Trainer.advance

    def recording(self, state, step, stop):
        trainers.append(self)
        return advance(self, state, step, stop)

    folder = tmp_path_factory.mktemp("latent")
    schedule = dataclasses.replace(FIT, steps=STEPS, eval_every=10, checkpoint_every=10)
    config = dataclasses.replace(tiny_config(folder), objective=OBJECTIVE, fit=schedule)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "advance", recording)
        run = fit(config, folder / "run").run
    tokens = jnp.asarray(run.vocabulary.encode(tiny_text()[:3600]))
    return SimpleNamespace(run=run, trainer=trainers[0], tokens=tokens, size=run.vocabulary.size)


@pytest.fixture(scope="module")
def start(fitted):
    parameters = draw(fitted.run.config, seed=6)
    # One symbol more or fewer than the vocabulary of another text.
    shapes = parameter_shapes(fitted.size, MODEL, OBJECTIVE)
    assert {name: np.shape(value) for name, value in parameters.items()} == {
        name: leaf.shape for name, leaf in shapes.items()
    }
    return parameters


def pair(size, start):
    """Model and guide as a user writes them, of a minibatch of a larger text."""
    model = partial(
        language_model,
        vocabulary_size=size,
        config=MODEL,
        objective=OBJECTIVE,
        num_sequences=SEQUENCES,
    )
    point = AutoDelta(
        lambda *_: sample_parameters(size, MODEL, OBJECTIVE),
        init_loc_fn=init_to_value(values=start),
    )
    guide = partial(latent_guide, parameters=point, objective=OBJECTIVE, num_sequences=SEQUENCES)
    return model, guide


@pytest.fixture(scope="module")
def evaluated(fitted, start):
    """Loss of the pair by NumPyro's own SVI and ELBO, and the draw that it is of."""
    model, guide = pair(fitted.size, start)
    per_token = 1 / (SEQUENCES * BLOCK)
    svi = SVI(
        handlers.scale(model, per_token),
        handlers.scale(guide, per_token),
        optax.adam(1e-3),
        Trace_ELBO(),
    )
    batch = fitted.trainer.minibatch(fitted.tokens, 0)

    @jax.jit
    def run():
        state = svi.init(jax.random.key(9), *batch)._replace(rng_key=jax.random.key(0))
        _, step_key = jax.random.split(state.rng_key)
        _, guide_key = jax.random.split(step_key)
        trace = handlers.trace(handlers.seed(guide, guide_key)).get_trace(*batch)
        return svi.evaluate(state, *batch), trace["embeddings"]["value"]

    loss, x = run()
    return SimpleNamespace(loss=float(loss), x=np.asarray(x), batch=batch)


def process_weights(parameters):
    """W_Q and W_K of the repulsive process, as the documentation says."""
    w_query, w_key = parameters["w_query"], parameters["w_key"]
    turn = w_query.T @ w_key
    return w_query, w_query @ (turn - turn.T - np.eye(RANK))


def log_process(parameters, x):
    """Log density of sequences under the process: Gaussian residuals and log determinants."""
    weights = [jnp.asarray(matrix) for matrix in process_weights(parameters)]
    sigma = math.exp(parameters["log_residual_scale"])

    @jax.jit
    def terms(sequence):
        sign, log_abs = reference.log_det(sequence, *weights)
        return reference.residual(sequence, *weights), sign, log_abs

    found = []
    for sequence in x:
        residual, sign, log_abs = terms(jnp.asarray(sequence))
        assert np.all(np.asarray(sign) == 1)
        found.append(norm.logpdf(np.asarray(residual), scale=sigma).sum() + float(log_abs.sum()))
    return np.array(found)


def log_guide(parameters, inputs, scale, x):
    means = np.asarray(embed(parameters, inputs))
    return norm.logpdf(x, means, scale * np.sqrt(np.mean(means**2))).sum((1, 2))


def test_the_loss_is_minus_the_bound_at_the_draw(evaluated, start):
    """- [N / B sum (log p(y | x) + beta (log p(x) - log q(x))) + log prior] / (N T), by hand."""
    (inputs, targets), x = evaluated.batch, evaluated.x
    means = np.asarray(embed(start, inputs))
    noise = (x - means) / (SCALE * np.sqrt(np.mean(means**2)))
    assert abs(noise.std() - 1) < 5 / math.sqrt(2 * noise.size)  # a draw of the guide, not its mean

    scores = log_softmax(np.asarray(logits(start, jnp.asarray(x), heads=MODEL.heads)), axis=-1)
    likelihood = np.take_along_axis(scores, np.asarray(targets)[..., None], -1).sum((1, 2))
    density = log_process(start, x)
    assert np.abs(density - log_process(start | {"w_key": 0 * start["w_key"]}, x)).max() > 1e-3
    ratio = density - log_guide(start, inputs, SCALE, x)
    others = {name: value for name, value in start.items() if name != "log_residual_scale"}
    prior = log_prior(others)
    prior += norm.logpdf(start["log_residual_scale"], math.log(math.sqrt(2) * 0.05), 1.0)
    sums = SEQUENCES / FIT.batch * (likelihood + BETA * ratio).sum()
    expected = -(sums + prior) / (SEQUENCES * BLOCK)
    assert evaluated.loss == pytest.approx(expected, rel=1e-12)


def test_a_step_of_a_fit_has_the_loss_of_numpyros_own(fitted, start, evaluated):
    learned = {f"{STATE}guide_scale": jnp.log(jnp.asarray(SCALE, jnp.float64))}
    _, progress = fitted.trainer.advance(state_at(fitted.trainer, start, **learned), 0, 1)
    assert float(progress.loss) == pytest.approx(evaluated.loss, rel=1e-12)


def test_the_model_draws_embeddings_and_then_tokens(start):
    """With logits in the hundreds the tokens are the largest ones at the draw, whatever the key."""
    size = len(start["token_embedding"])
    sharp = start | {"final_norm": 1000 * start["final_norm"]}
    model, _ = pair(size, start)
    points = jax.tree.map(lambda value: jnp.asarray(value)[None], sharp)
    inputs = jnp.zeros((3, BLOCK), int)
    draws = jax.jit(lambda key: Predictive(model, points)(key, inputs))(jax.random.key(0))
    assert draws["embeddings"].shape == (1, 3, BLOCK, WIDTH)
    scores = np.asarray(logits(sharp, draws["embeddings"][0], heads=MODEL.heads))
    np.testing.assert_array_equal(draws["tokens"][0], scores.argmax(-1))
    first = draws["embeddings"][0, :, 0] / math.exp(start["log_residual_scale"])
    assert 0.5 < np.std(first) < 2  # the first token is its own residual


def test_sites_and_their_weights(fitted, start):
    model, guide = pair(fitted.size, start)
    inputs = jnp.zeros((FIT.batch, BLOCK), int)
    found = {}

    def trace_both():
        for name, function in (("model", model), ("guide", guide)):
            seeded = handlers.seed(function, jax.random.key(0))
            found[name] = handlers.trace(seeded).get_trace(inputs, inputs)

    jax.eval_shape(trace_both)
    names = {
        part: {name for name, site in trace.items() if site["type"] == "sample"}
        for part, trace in found.items()
    }
    assert names["model"] == {*start, "embeddings", "tokens"}
    assert names["guide"] == {*start, "embeddings"}
    for trace in found.values():
        site = trace["embeddings"]
        assert site["scale"] == pytest.approx(BETA * SEQUENCES / FIT.batch)
        assert site["fn"].event_shape == (BLOCK, WIDTH)
        assert [plate.name for plate in site["cond_indep_stack"]] == ["sequences"]
    assert found["model"]["tokens"]["scale"] == pytest.approx(SEQUENCES / FIT.batch)


@pytest.mark.parametrize("bound", [None, 0.4])
def test_the_process_is_proper_wherever_the_parameters_are(bound):
    config = dataclasses.replace(MODEL, bound=bound)
    parameters = draw(SimpleNamespace(objective=OBJECTIVE), w_query=20, w_key=20)
    parameters = {name: jnp.asarray(value) for name, value in parameters.items()}
    process = latent_process(parameters, BLOCK, config=config)
    assert is_proper(process.w_query, process.w_key, bound=process.bound)
    assert process.bound == bound
    assert float(process.scale) == pytest.approx(math.exp(parameters["log_residual_scale"]))


def test_a_fit_reports_what_its_draws_cost(fitted):
    """Cross-entropy at the mean and at draws, divergence, and scales, at the last parameters."""
    rows = fitted.run.metrics()
    added = ["sampled_cross_entropy", "validation_sampled_cross_entropy", "kl", "validation_kl"]
    for row in rows:
        assert {*added, "guide_scale", "residual_scale"} <= row.keys()
        assert row["infeasible_fraction"] == 0
        assert row["rejected_steps"] == 0
    assert rows[0]["guide_scale"] != rows[1]["guide_scale"] != SCALE
    best = min(rows, key=lambda row: row["validation_cross_entropy"])
    assert fitted.run.step == best["step"]
    parameters = {name: np.asarray(value) for name, value in fitted.run.parameters.items()}
    sigma = math.exp(parameters["log_residual_scale"])
    assert best["residual_scale"] == pytest.approx(sigma, rel=1e-12)

    # The divergence from draws of our own: the same to within the spread of such estimates.
    inputs = fitted.run.vocabulary.encode(tiny_text()[3600:])[: 49 * BLOCK].reshape(-1, BLOCK)
    means = np.asarray(embed(parameters, inputs))
    rng = np.random.default_rng(0)
    spread = best["guide_scale"] * np.sqrt(np.mean(means**2))
    x = means + spread * rng.normal(size=means.shape)
    ratios = log_guide(parameters, inputs, best["guide_scale"], x) - log_process(parameters, x)
    error = ratios.std() / math.sqrt(len(ratios)) / BLOCK
    assert best["validation_kl"] == pytest.approx(ratios.mean() / BLOCK, abs=5 * error)
    scores = log_softmax(np.asarray(logits(parameters, x, heads=MODEL.heads)), axis=-1)
    targets = fitted.run.vocabulary.encode(tiny_text()[3601:])[: 49 * BLOCK].reshape(-1, BLOCK)
    losses = -np.take_along_axis(scores, targets[..., None], -1)[..., 0]
    error = losses.std() / math.sqrt(losses.size)
    sampled = best["validation_sampled_cross_entropy"]
    assert sampled == pytest.approx(losses.mean(), abs=5 * error)


def test_another_objective_has_no_such_report(fitted):
    config = dataclasses.replace(fitted.run.config, objective=ObjectiveConfig("ce"))
    assert latent_metrics(config, {}, {}, {}) == {}


def test_a_latent_run_opens_with_the_stage_of_its_process(fitted):
    run = load_run(fitted.run.path)
    assert run.config.objective == OBJECTIVE
    matrices = np.zeros((WIDTH, RANK))
    trained = {
        stage.label: stage
        for stage in stages(run, SimpleNamespace(w_query=matrices, w_key=matrices))
    }["trained"]
    parameters = {name: np.asarray(value) for name, value in run.parameters.items()}
    for got, expected in zip(
        (trained.w_query, trained.w_key), process_weights(parameters), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)
    assert (trained.input, trained.bound) == ("embeddings", None)
    assert {name: np.ndim(value) for name, value in parameters.items()} == {
        name: len(DIMS[name]) for name in parameters
    }
