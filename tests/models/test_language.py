"""The joint density of the language model against an independent formula, and NumPyro on it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
import scipy.special
import scipy.stats
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, log_likelihood
from numpyro.infer.autoguide import AutoDelta
from numpyro.infer.initialization import init_to_value
from numpyro.infer.util import log_density

from probattn import _reference as reference
from probattn import jacobian_blocks, residual
from probattn.models import LanguageModelConfig, ObjectiveConfig, language_model
from probattn.models.language import attention_stage, parameter_shapes
from tests.support.numpy_network import (
    BATCH,
    BLOCK,
    HEADS,
    LAYERS,
    RANK,
    SHAPES,
    VOCABULARY,
    WIDTH,
    numpy_embed,
    numpy_logits,
    numpy_norm,
    random_parameters,
    random_tokens,
)

CONFIG = LanguageModelConfig(layers=LAYERS, heads=HEADS, width=WIDTH, block=BLOCK, prior_rank=RANK)
INPUTS, TARGETS = jnp.asarray(random_tokens(0)), jnp.asarray(random_tokens(1))
TOKENS = BATCH * BLOCK
TRAINING_SEQUENCES = 10 * BATCH

OBJECTIVES = {
    "ce": ObjectiveConfig("ce"),
    "margin": ObjectiveConfig("margin"),
    "full": ObjectiveConfig("full"),
    "margin_first_layer": ObjectiveConfig("margin", attention="first_layer"),
    "full_first_layer": ObjectiveConfig("full", attention="first_layer"),
    "all_given": ObjectiveConfig(
        "margin", barrier_weight=0.3, residual_weight=2.0, residual_scale=0.7, delta=0.9
    ),
    "normalised_one_sided": ObjectiveConfig("full", attention="normalised", one_sided=True),
}
FACTORS = {
    "ce": set(),
    "margin": {"attention_barrier"},
    "full": {"attention_barrier", "attention_residual"},
    "margin_first_layer": {"attention_barrier"},
    "full_first_layer": {"attention_barrier", "attention_residual"},
    "all_given": {"attention_barrier", "attention_residual"},
    "normalised_one_sided": {"attention_barrier", "attention_residual"},
}
all_objectives = pytest.mark.parametrize("name", OBJECTIVES)
# A compilation each: `make test-slow` tries these.
SLOW = {"margin_first_layer", "all_given", "normalised_one_sided"}
compiled_objectives = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in OBJECTIVES]
)
PER_LAYER = {"attention_norm", "attention_in", "attention_out", "mlp_norm", "mlp_in", "mlp_out"}
ATTENTION_STAGE = {"w_query": (WIDTH, RANK), "w_key": (WIDTH, RANK)}


def model_of(name, **options):
    """The model of an objective, of INPUTS and TARGETS unless others are given."""
    options = {"vocabulary_size": VOCABULARY, "config": CONFIG} | options
    return functools.partial(language_model, objective=OBJECTIVES[name], **options)


def shapes_of(name):
    """Shapes by the documentation, not by the model."""
    separate = OBJECTIVES[name].attention != "first_layer" and name != "ce"
    return SHAPES | (ATTENTION_STAGE if separate else {})


@functools.cache
def parameters_of(name, seed=2, dtype=np.float64):
    """Parameters at which attention is sharp and the determinants are far from one."""
    parameters = random_parameters(seed, dtype)
    if set(ATTENTION_STAGE) <= set(shapes_of(name)):
        rng = np.random.default_rng(seed + 1)
        for site, shape in ATTENTION_STAGE.items():
            parameters[site] = (0.5 * rng.standard_normal(shape)).astype(dtype)
    return parameters


def abstract_trace(model, *arguments, parameters=None):
    """Sites by name with value and distribution as shapes, found without computing anything."""
    found = {}

    def run(parameters):
        seeded = handlers.seed(handlers.substitute(model, parameters), jax.random.key(0))
        found.update(handlers.trace(seeded).get_trace(*arguments))

    jax.eval_shape(run, {} if parameters is None else parameters)
    return found


@functools.cache
def evaluation(name, bound=None):
    """What NumPyro makes of INPUTS and TARGETS at any parameters, in one compiled function.

    "whole" and "part": the joint log density of them as all of the data, and as a tenth of it;
    "sites": the log probability of every observed site and sequence; "priors": mean and variance
    of every parameter.
    """
    options = {"config": dataclasses.replace(CONFIG, bound=bound)}
    whole = model_of(name, **options)
    # The plate draws the indices of its minibatch, and so needs a key.
    part = handlers.seed(model_of(name, num_sequences=TRAINING_SEQUENCES, **options), 0)

    @jax.jit
    def evaluate(parameters):
        density, trace = log_density(whole, (INPUTS, TARGETS), {}, parameters)
        priors = {k: (site["fn"].mean, site["fn"].variance) for k, site in latent(trace).items()}
        return {
            "whole": density,
            "part": log_density(part, (INPUTS, TARGETS), {}, parameters)[0],
            "sites": observed_log_probs(trace),
            "priors": priors,
        }

    return evaluate


@functools.cache
def evaluated(name):
    return evaluation(name)(parameters_of(name))


def observed_log_probs(trace):
    return {k: site["fn"].log_prob(site["value"]) for k, site in observed(trace).items()}


def observed(trace):
    return {k: v for k, v in trace.items() if v["type"] == "sample" and v["is_observed"]}


def latent(trace):
    return {k: v for k, v in trace.items() if v["type"] == "sample" and not v["is_observed"]}


def log_prior(name):
    """Sum of Normal log densities with the means and variances that the model was given."""
    parameters, priors = parameters_of(name), evaluated(name)["priors"]
    assert set(priors) == set(parameters)
    return sum(
        scipy.stats.norm.logpdf(parameters[site], mean, np.sqrt(variance)).sum()
        for site, (mean, variance) in priors.items()
    )


@jax.jit
def dense(x, w_query, w_key):
    """D_t and e_t of every sequence, by the slow oracle."""
    stage = w_query, w_key
    return jax.vmap(
        lambda sequence: (
            reference.jacobian_blocks(sequence, *stage),
            reference.residual(sequence, *stage),
        )
    )(x)


def attention_stages(name, parameters, x):
    """Arguments (x, w_query, w_key) of every attention that carries the barrier: one, or heads."""
    if OBJECTIVES[name].attention == "normalised":
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-8)
    if OBJECTIVES[name].attention != "first_layer":
        return [(x, parameters["w_query"], parameters["w_key"])]
    gain = parameters["attention_norm"][0]
    rows = np.array([[numpy_norm(row, gain) for row in sequence] for sequence in x])
    columns = np.split(np.arange(WIDTH), HEADS)
    first = parameters["attention_in"][0]
    return [(rows, first[:, each], first[:, WIDTH + each]) for each in columns]


@functools.cache
def terms(name):
    """Log likelihood, relaxed barrier and residual energy of every sequence, and all dets."""
    parameters, objective = parameters_of(name), OBJECTIVES[name]
    x = numpy_embed(parameters, np.asarray(INPUTS))
    scores = scipy.special.log_softmax(numpy_logits(parameters, x), axis=-1)
    likelihood = np.take_along_axis(scores, np.asarray(TARGETS)[..., None], -1).sum((1, 2))
    barrier, energy, dets = np.zeros(BATCH), np.zeros(BATCH), []
    if name != "ce":
        stages = attention_stages(name, parameters, x)
        for stage in stages:
            blocks, residuals = (np.asarray(part) for part in dense(*stage))
            dets.append(np.linalg.det(blocks))
            relaxed = np.asarray(reference.relaxed_logarithm(dets[-1], objective.delta))
            if objective.one_sided:
                relaxed = np.where(dets[-1] < 1, relaxed, 0)
            barrier += relaxed.sum(1) / len(stages)
            energy += np.sum((residuals / objective.residual_scale) ** 2, (1, 2)) / 2 / len(stages)
    return likelihood, barrier, energy, np.array(dets)


@compiled_objectives
def test_joint_density_of_a_minibatch_counts_the_prior_once(name):
    likelihood, barrier, energy, _ = terms(name)
    barrier_weight, residual_weight = OBJECTIVES[name].weights
    sequences = likelihood - barrier_weight * barrier - residual_weight * energy
    expected = log_prior(name)
    expected += TRAINING_SEQUENCES / BATCH * sequences.sum()
    np.testing.assert_allclose(evaluated(name)["part"], expected, rtol=1e-12)


@compiled_objectives
def test_joint_density_per_token_is_the_objective(name):
    """CE + lambda_m mean barrier + lambda_r mean energy - log prior / N, over all of the data."""
    likelihood, barrier, energy, _ = terms(name)
    barrier_weight, residual_weight = OBJECTIVES[name].weights
    cross_entropy = -likelihood.sum() / TOKENS
    mean_barrier, mean_energy = barrier.sum() / TOKENS, energy.sum() / TOKENS
    objective = cross_entropy + barrier_weight * mean_barrier + residual_weight * mean_energy
    expected = -objective + log_prior(name) / TOKENS
    np.testing.assert_allclose(evaluated(name)["whole"] / TOKENS, expected, rtol=1e-12)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "ce"])
def test_the_oracle_sees_barriers_worth_testing(name):
    """Determinants away from one, none past the oracle's end; and one case on both branches."""
    dets, delta = terms(name)[3], OBJECTIVES[name].delta
    assert np.abs(dets - 1).max() > 0.1
    assert dets.min() >= -10 * delta
    assert np.any(dets < delta) == (name == "all_given")
    if OBJECTIVES[name].one_sided:
        assert np.any(dets < 0.9)
        assert np.any(dets > 1.1)


def test_full_objective_is_the_attention_log_density_up_to_a_constant():
    """Where every determinant is beyond delta: log Normal(e_t; 0, I) + log det D_t, summed."""
    parameters = parameters_of("full")
    x = numpy_embed(parameters, np.asarray(INPUTS))
    blocks, residuals = dense(x, parameters["w_query"], parameters["w_key"])
    sign, log_abs = np.linalg.slogdet(blocks)
    assert np.all(sign == 1)
    expected = log_abs.sum(1) + scipy.stats.norm.logpdf(residuals).sum((1, 2))
    factors = evaluated("full")["sites"]
    constant = -BLOCK * WIDTH / 2 * np.log(2 * np.pi)
    got = factors["attention_barrier"] + factors["attention_residual"] + constant
    np.testing.assert_allclose(got, expected, rtol=1e-12)


@functools.cache
def trace_of(name):
    return abstract_trace(model_of(name, num_sequences=TRAINING_SEQUENCES), INPUTS, TARGETS)


@all_objectives
def test_sites_and_plates_are_those_documented(name):
    trace = trace_of(name)
    sites = latent(trace)
    assert {k: jnp.shape(site["value"]) for k, site in sites.items()} == shapes_of(name)
    seen = observed(trace)
    assert set(seen) == {"tokens"} | FACTORS[name]
    assert {k for k, v in trace.items() if v["type"] == "plate"} == {"layers", "sequences"}

    for site in seen.values():
        (plate,) = site["cond_indep_stack"]
        assert (plate.name, plate.dim, plate.size) == ("sequences", -1, BATCH)
        assert site["scale"] == TRAINING_SEQUENCES / BATCH
        assert site["fn"].batch_shape == (BATCH,)
    assert seen["tokens"]["fn"].event_shape == (BLOCK,)
    for k, site in sites.items():
        plates = [(plate.name, plate.size) for plate in site["cond_indep_stack"]]
        assert plates == ([("layers", LAYERS)] if k in PER_LAYER else [])
        assert site["scale"] in (None, 1)


@all_objectives
def test_parameter_shapes_are_those_of_the_sites(name):
    shapes = parameter_shapes(VOCABULARY, CONFIG, OBJECTIVES[name])
    sites = latent(trace_of(name))
    assert {k: (s.shape, s.dtype) for k, s in shapes.items()} == {
        k: (jnp.shape(s["value"]), s["value"].dtype) for k, s in sites.items()
    }


@pytest.mark.parametrize(
    "name", ["ce", *(pytest.param(n, marks=pytest.mark.slow) for n in ("full", "full_first_layer"))]
)
def test_log_likelihood_has_one_entry_per_draw_and_sequence(name):
    draws = [parameters_of(name), parameters_of(name, seed=3)]
    stacked = jax.tree.map(lambda *each: np.stack(each), *draws)
    result = jax.jit(lambda draws: log_likelihood(model_of(name), draws, INPUTS, TARGETS))(stacked)
    assert {k: v.shape for k, v in result.items()} == dict.fromkeys(
        {"tokens"} | FACTORS[name], (2, BATCH)
    )
    likelihood, barrier, energy, _ = terms(name)
    np.testing.assert_allclose(result["tokens"][0], likelihood, rtol=1e-12)
    if name != "ce":
        np.testing.assert_allclose(result["attention_barrier"][0], -barrier, rtol=0, atol=1e-10)
        np.testing.assert_allclose(result["attention_residual"][0], -energy, rtol=1e-12)
    assert np.all(result["tokens"][0] != result["tokens"][1])


def test_predictive_of_a_posterior_draws_tokens_from_the_logits():
    """With logits in the hundreds a draw is the largest one, whatever the key."""
    parameters = dict(parameters_of("margin"))
    parameters["final_norm"] = parameters["final_norm"] * 1000
    logits = numpy_logits(parameters, numpy_embed(parameters, np.asarray(INPUTS)))
    two = np.sort(logits, axis=-1)[..., -2:]
    assert np.diff(two).min() > 20
    draws = {site: np.stack([value] * 4) for site, value in parameters.items()}
    predict = jax.jit(lambda key: Predictive(model_of("margin"), draws)(key, INPUTS)["tokens"])
    tokens = predict(jax.random.key(0))
    assert tokens.shape == (4, BATCH, BLOCK)
    assert jnp.issubdtype(tokens.dtype, jnp.integer)
    np.testing.assert_array_equal(tokens, np.stack([logits.argmax(-1)] * 4))


def prior_draws(key):
    return Predictive(model_of("ce"), num_samples=50)(key, INPUTS)


def test_predictive_of_the_prior_draws_every_site():
    draws = jax.eval_shape(prior_draws, jax.random.key(0))
    assert {site: draws[site].shape for site in SHAPES} == {
        site: (50, *shape) for site, shape in SHAPES.items()
    }
    assert draws["tokens"].shape == (50, BATCH, BLOCK)


@pytest.mark.slow
def test_predictive_of_the_prior_draws_tokens_in_range():
    draws = jax.jit(prior_draws)(jax.random.key(0))
    assert set(np.unique(draws["tokens"])) == set(range(VOCABULARY))


def test_barrier_sees_nothing_above_the_attention_stage():
    """Corollary 6.1: the deeper layers change the likelihood and no bit of the factors."""
    name, deeper = "full_first_layer", {}
    for site, value in parameters_of(name).items():
        deeper[site] = value.copy()
        if site in PER_LAYER:
            deeper[site][1:] += 0.5
    for site in ("attention_out", "mlp_norm", "mlp_in", "mlp_out", "final_norm"):
        deeper[site] = deeper[site] - 0.3
    deeper["attention_in"][0, :, 2 * WIDTH :] += 0.5  # the values of the first layer
    result = [evaluated(name)["sites"], evaluation(name)(deeper)["sites"]]
    assert np.all(result[0]["tokens"] != result[1]["tokens"])
    for factor in FACTORS[name]:
        np.testing.assert_array_equal(result[0][factor], result[1][factor])


@pytest.mark.parametrize("name", ["full", "full_first_layer"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_model_follows_the_dtype_of_its_parameters(name, dtype):
    trace = abstract_trace(
        model_of(name), INPUTS, TARGETS, parameters=parameters_of(name, dtype=dtype)
    )
    assert trace["tokens"]["fn"].base_dist.logits.dtype == dtype
    for factor in FACTORS[name]:
        assert trace[factor]["fn"].log_factor.dtype == dtype


def test_bfloat16_products_make_no_site_bfloat16():
    parameters = parameters_of("full", dtype=np.float32)
    model = model_of("full", precision="bfloat16")
    sites = observed(abstract_trace(model, INPUTS, TARGETS, parameters=parameters))
    assert sites["tokens"]["fn"].base_dist.logits.dtype == np.float32
    for factor in FACTORS["full"]:
        assert sites[factor]["fn"].log_factor.dtype == np.float32


@pytest.mark.slow
def test_bfloat16_products_leave_the_barrier_alone():
    @jax.jit
    def both(parameters):
        return [
            observed_log_probs(
                log_density(
                    model_of("full", precision=precision), (INPUTS, TARGETS), {}, parameters
                )[1]
            )
            for precision in ("float32", "bfloat16")
        ]

    full, half = both(parameters_of("full", dtype=np.float32))
    assert np.all(full["tokens"] != half["tokens"])
    np.testing.assert_allclose(full["tokens"], half["tokens"], rtol=0.05)
    for factor in FACTORS["full"]:
        assert half[factor].dtype == np.float32
        np.testing.assert_array_equal(full[factor], half[factor])


def test_a_disturbance_reaches_the_network_and_no_factor():
    shift = np.random.default_rng(5).normal(size=(BATCH, BLOCK, WIDTH))
    parameters = parameters_of("full")
    model = model_of("full", perturb=lambda x: x + shift)

    @jax.jit
    def log_probs(parameters):
        return observed_log_probs(log_density(model, (INPUTS, TARGETS), {}, parameters)[1])

    disturbed = log_probs(parameters)
    x = numpy_embed(parameters, np.asarray(INPUTS)) + shift
    scores = scipy.special.log_softmax(numpy_logits(parameters, x), axis=-1)
    expected = np.take_along_axis(scores, np.asarray(TARGETS)[..., None], -1).sum((1, 2))
    np.testing.assert_allclose(disturbed["tokens"], expected, rtol=1e-12)
    for factor in FACTORS["full"]:
        np.testing.assert_array_equal(disturbed[factor], evaluated("full")["sites"][factor])


@pytest.mark.slow  # the steps of a fit are compared with NumPyro's loop on this model, too
def test_svi_of_a_user_lowers_minus_the_joint_density():
    """A minibatch of a larger text under AutoDelta, whose loss is exactly the joint density."""
    model = model_of("margin", num_sequences=TRAINING_SEQUENCES)
    guide = AutoDelta(model, init_loc_fn=init_to_value(values=parameters_of("margin")))
    svi = SVI(model, guide, numpyro.optim.Adam(0.01), Trace_ELBO())
    start = jax.jit(lambda key: svi.init(key, INPUTS, TARGETS))(jax.random.key(0))
    result = svi.run(jax.random.key(1), 30, INPUTS, TARGETS, progress_bar=False, init_state=start)

    def loss(params):
        return -evaluation("margin")(guide.median(params))["part"]

    first, last = (loss(p) for p in (svi.get_params(start), result.params))
    np.testing.assert_allclose(result.losses[0], first, rtol=1e-12)
    assert last < result.losses[-1] < result.losses[10] < first
    assert set(guide.median(result.params)) == set(shapes_of("margin"))


@pytest.mark.slow
def test_nuts_of_a_user_samples_the_joint_density():
    config = LanguageModelConfig(layers=1, heads=1, width=2, block=3, prior_rank=1)
    inputs = jnp.asarray([[0, 1, 2], [2, 1, 0]])
    targets = jnp.asarray([[1, 2, 0], [1, 0, 2]])
    model = model_of("margin", vocabulary_size=3, config=config)

    @jax.jit  # every operation of the start by itself takes longer to compile than all in one
    def run(key):
        kernel = NUTS(model, max_tree_depth=3)
        mcmc = MCMC(kernel, num_warmup=5, num_samples=4, progress_bar=False)
        mcmc.run(key, inputs, targets, extra_fields=("potential_energy",))
        return mcmc.get_samples(), mcmc.get_extra_fields()["potential_energy"]

    samples, potential_energy = run(jax.random.key(0))
    assert set(samples) == set(shapes_of("margin"))
    assert samples["attention_in"].shape == (4, 1, 2, 6)
    assert len(np.unique(samples["token_embedding"][:, 0, 0])) > 1

    def potential(parameters):
        return -log_density(model, (inputs, targets), {}, parameters)[0]

    expected = jax.lax.map(potential, samples)
    np.testing.assert_allclose(potential_energy, expected, rtol=1e-12)


@pytest.mark.parametrize("field", ["layers", "heads", "width", "block", "prior_rank"])
@pytest.mark.parametrize("value", [0, -1, True, 2.0, "4", None])
def test_a_size_that_makes_no_network_is_refused(field, value):
    least = 3 if field == "block" else 1
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        LanguageModelConfig(**{field: value})
    assert str(error.value) == f"model.{field} is {value!r}: expected an integer >= {least}"


def test_a_block_without_margins_is_refused():
    with pytest.raises(ValueError, match=r"^model\.block is 2: expected an integer >= 3$"):
        LanguageModelConfig(block=2)
    assert LanguageModelConfig(block=3).block == 3


@pytest.mark.parametrize("heads", [3, 16])
def test_heads_that_do_not_divide_the_width_are_refused(heads):
    expected = rf"^model\.heads is {heads} and model\.width 8: expected heads to divide width$"
    with pytest.raises(ValueError, match=expected):
        LanguageModelConfig(width=8, heads=heads)


@pytest.mark.parametrize("shape", [(BLOCK,), (BATCH, BLOCK, 1), (BATCH, BLOCK + 1), (BATCH, 0)])
def test_inputs_of_wrong_shape_say_given_and_expected(shape):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        model_of("margin")(jnp.zeros(shape, int))
    assert str(error.value).startswith(f"inputs have shape {shape}: expected (B, T)")
    assert f"1 <= T <= block = {BLOCK}" in str(error.value)


@pytest.mark.parametrize("shape", [(BATCH, BLOCK - 1), (BATCH + 1, BLOCK), (BLOCK,)])
def test_targets_of_wrong_shape_say_given_and_expected(shape):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        model_of("margin")(INPUTS, jnp.zeros(shape, int))
    expected = f"targets have shape {shape}: expected that of inputs, {(BATCH, BLOCK)}"
    assert str(error.value) == expected


@pytest.mark.parametrize("count", [0, -1, BATCH - 1])
def test_fewer_sequences_than_the_minibatch_are_refused(count):
    with pytest.raises(ValueError, match=rf"num_sequences is {count}: expected .*{BATCH}"):
        abstract_trace(model_of("margin", num_sequences=count), INPUTS, TARGETS)


@pytest.mark.parametrize(("name", "symbol"), [("inputs", VOCABULARY), ("targets", -1)])
def test_what_is_no_symbol_is_refused(name, symbol):
    tokens = {which: np.zeros((2, BLOCK), np.int32) for which in ("inputs", "targets")}
    tokens[name][1, 2] = symbol
    with pytest.raises(
        ValueError, match=f"{name} are .*: expected symbols from 0 to {VOCABULARY - 1},"
    ):
        language_model(**tokens, vocabulary_size=VOCABULARY, config=CONFIG)


def test_a_count_of_sequences_that_is_no_integer_is_refused():
    inputs = np.zeros((2, BLOCK), np.int32)
    with pytest.raises(ValueError, match=r"num_sequences is 16\.0: expected an integer"):
        language_model(inputs, vocabulary_size=VOCABULARY, config=CONFIG, num_sequences=16.0)


def test_a_batch_of_no_sequences_is_refused():
    with pytest.raises(ValueError, match=rf"inputs have shape \(0, {BLOCK}\): expected"):
        abstract_trace(model_of("margin"), INPUTS[:0])


# A bounded context


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", pytest.param("full_first_layer", marks=pytest.mark.slow)])
def test_the_bound_is_that_of_the_separate_stage_and_of_no_other(name):
    parameters, objective = parameters_of(name), OBJECTIVES[name]
    bound = 0.5 if name == "full" else None
    got = evaluation(name, bound=0.5)(parameters)["sites"]

    @jax.jit
    def expected(stage):
        energy = jnp.sum(residual(*stage, bound=bound) ** 2, (1, 2)) / 2
        return jacobian_blocks(*stage, bound=bound), energy

    stages = attention_stages(name, parameters, numpy_embed(parameters, np.asarray(INPUTS)))
    barrier = energy = 0.0
    for stage in stages:
        blocks, energies = expected(stage)
        dets = np.linalg.det(blocks)
        barrier += reference.relaxed_logarithm(dets, objective.delta).sum(1) / len(stages)
        energy += energies / len(stages)
    np.testing.assert_allclose(got["attention_barrier"], -barrier, rtol=1e-9)
    np.testing.assert_allclose(got["attention_residual"], -energy, rtol=1e-9)


@pytest.mark.parametrize(("name", "bound"), [("full", 0.5), ("full_first_layer", None)])
def test_the_stage_that_carries_the_barrier_has_the_bound_or_none(name, bound):
    config, found = dataclasses.replace(CONFIG, bound=0.5), []

    def note(parameters, x):
        stage = attention_stage(parameters, x, config=config, objective=OBJECTIVES[name])
        found.append(stage["bound"])

    jax.eval_shape(note, parameters_of(name), np.zeros((BATCH, BLOCK, WIDTH)))
    assert found == [bound]


@pytest.mark.parametrize("bound", [0.0, -1.0, np.inf, np.nan])
def test_a_bound_that_is_none_is_refused(bound):
    with pytest.raises(ValueError, match=r"model.bound is .*: expected a finite number > 0"):
        dataclasses.replace(CONFIG, bound=bound)


def test_the_output_may_have_a_table_of_its_own():
    parameters = parameters_of("ce")
    table = np.random.default_rng(9).standard_normal(parameters["token_embedding"].shape)
    given = parameters | {"output_embedding": table}
    model = model_of("ce", own_output=True)
    sites = abstract_trace(model, INPUTS, TARGETS, parameters=given)
    assert sites.keys() == abstract_trace(model_of("ce"), INPUTS, TARGETS).keys() | {
        "output_embedding"
    }

    @jax.jit
    def evaluate(parameters):
        _, trace = log_density(model, (INPUTS, TARGETS), {}, parameters)
        priors = (trace[f"{table}_embedding"]["fn"] for table in ("output", "token"))
        return observed_log_probs(trace), [(prior.mean, prior.variance) for prior in priors]

    found, (prior, of_input) = evaluate(given)
    # The table that these logits take is the output's alone.
    logits = numpy_logits(parameters | {"token_embedding": table}, numpy_embed(parameters, INPUTS))
    expected = np.take_along_axis(
        scipy.special.log_softmax(logits, -1), np.asarray(TARGETS)[..., None], -1
    )
    np.testing.assert_allclose(found["tokens"], expected.sum((-2, -1)), rtol=1e-10)
    np.testing.assert_array_equal(prior, of_input)
