"""The export of NumPyro's own draws and of users' own models: names, margins, refusals."""

from functools import partial

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.handlers import scope
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoNormal

from probattn import CausalAttention, certificate, stability_margin
from probattn.inference import SampleConfig, sample, to_datatree
from probattn.inference.sampling.result import PosteriorResult
from probattn.models import (
    LanguageModelConfig,
    LatentEmbeddingsConfig,
    ObjectiveConfig,
    language_model,
    latent_embeddings,
)
from probattn.models.coupling import attention_weights_of
from probattn.models.language import parameter_shapes
from tests.support.refusals import refusal

RNG = np.random.default_rng(5)
X = RNG.normal(size=(3, 5, 2))
Y = RNG.normal(size=6)


def attention(x):
    """One attention process, which records no margins itself."""
    coupling = numpyro.sample("a", dist.Normal(0.0, 0.3).expand((2, 2)).to_event(2))
    with numpyro.plate("texts", 3):
        numpyro.sample("x", CausalAttention(*attention_weights_of(coupling), 1.0, 5), obs=x)


def grouped(y, scale=1.0):
    with numpyro.plate("team", 3):
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    effect = dist.ZeroSumNormal(1.0, event_shape=(4,))
    g = numpyro.sample("g", effect, infer={"event_dims": ["group"]})
    loose = numpyro.sample("loose", dist.Normal(jnp.zeros(2), 1.0))
    mean = b.sum() + g[0] + loose.sum()
    with numpyro.plate("rows", 6):
        numpyro.deterministic("mean", jnp.full(6, mean))
        with numpyro.handlers.mask(mask=jnp.arange(6) < 3):
            numpyro.factor("penalty", -(jnp.full(6, mean) ** 2))
        numpyro.sample("y", dist.Normal(mean, scale), obs=y)


GROUPED = {"b": RNG.normal(size=(7, 3)), "g": RNG.normal(size=(7, 4)), "loose": np.ones((7, 2))}


@pytest.mark.slow
def test_samples_of_ones_own_attention_model_have_margins_and_support():
    draws = 0.3 * RNG.normal(size=(8, 2, 2))
    tree = to_datatree({"a": draws}, model=attention, model_args=(X,))
    posterior = tree["posterior"].to_dataset()
    assert posterior["margin"].dims == ("chain", "draw", "sequence", "position")
    weights = [attention_weights_of(jnp.asarray(draw)) for draw in draws]
    expected = np.stack([stability_margin(X, *each) for each in weights])
    np.testing.assert_allclose(posterior["margin"].values[0], expected, rtol=1e-9)
    np.testing.assert_allclose(posterior["sequence_margin"].values[0], expected[..., 2:].min(-1))
    first = 2 + expected[..., 2:].argmin(-1)
    support = tree["support_tokens"].to_dataset()
    counts = (first[..., None] == np.arange(5)).mean(0)
    np.testing.assert_allclose(support["support_probability"].values, counts)
    certified = np.stack([certificate(X, *each) for each in weights]) < 1
    np.testing.assert_allclose(support["certified_probability"].values, certified.mean(0))
    np.testing.assert_array_equal(tree["observed_data"]["x"].values, X)
    assert tree["observed_data"]["x"].dims[0] == "texts"


def test_dimensions_have_the_names_of_plates_and_events():
    tree = to_datatree(GROUPED, model=grouped, model_args=(Y,), log_likelihood=True, prior=2)
    assert tree["posterior"].to_dataset().sizes["draw"] == 7
    for group in ("posterior", "prior"):
        found = {name: value.dims[2:] for name, value in tree[group].data_vars.items()}
        assert found == {
            "b": ("team",),
            "g": ("group",),
            "loose": ("loose_dim_0",),
            "mean": ("rows",),
        }
    assert tree["log_likelihood"]["y"].dims == ("chain", "draw", "rows")
    assert tree["observed_data"]["y"].dims == ("rows",)
    assert tree["posterior"].coords["rows"].size == 6
    own = to_datatree(GROUPED, model=grouped, model_args=(Y,), dims={"b": ["side"]})
    assert own["posterior"]["b"].dims == ("chain", "draw", "side")


def test_a_factor_that_is_masked_is_no_likelihood():
    tree = to_datatree(GROUPED, model=grouped, model_args=(Y,), log_likelihood=True)
    assert set(tree["log_likelihood"].data_vars) == set(tree["observed_data"].data_vars) == {"y"}


@pytest.mark.slow
def test_scoped_sites_are_exported_with_points_and_have_margins_each():
    def model(x):
        for name in ("left", "right"):
            with scope(prefix=name):
                attention(x)

    draws = {f"{name}/a": 0.3 * RNG.normal(size=(2, 3, 2, 2)) for name in ("left", "right")}
    tree = to_datatree(draws, model=model, model_args=(X,), log_likelihood=True)
    posterior = tree["posterior"].to_dataset()
    assert {"left.a", "right.a", "left.x.margin", "right.x.margin"} <= set(posterior.data_vars)
    assert tree["observed_data"]["left.x"].dims[0] == "left.texts"
    assert set(tree["log_likelihood"].data_vars) == {"left.x", "right.x"}
    support = tree["support_tokens"].to_dataset()
    for name in ("left", "right"):
        np.testing.assert_allclose(support[f"{name}.x.support_probability"].sum("position"), 1)
        weights = attention_weights_of(jnp.asarray(draws[f"{name}/a"][1, 2]))
        found = posterior[f"{name}.x.margin"].values[1, 2]
        np.testing.assert_allclose(found, stability_margin(X, *weights), rtol=1e-9)


def test_sites_of_ones_own_that_are_called_as_ours_are():
    def model(y):
        w_query = numpyro.sample("w_query", dist.Normal(0.0, 1.0).expand((5, 3)).to_event(2))
        numpyro.sample("w_key", dist.Normal(0.0, 1.0).expand((4, 3)).to_event(2))
        numpyro.deterministic("margin", w_query[:2, :2])
        numpyro.deterministic("certificate", w_query[0])
        numpyro.sample("tokens", dist.Normal(0.0, 1.0).expand((6,)).to_event(1), obs=y)

    draws = {"w_query": RNG.normal(size=(9, 5, 3)), "w_key": RNG.normal(size=(9, 4, 3))}
    tree = to_datatree(draws, model=model, model_args=(Y,), log_likelihood=True)
    posterior = tree["posterior"].to_dataset()
    np.testing.assert_array_equal(posterior["margin"].values[0], draws["w_query"][:, :2, :2])
    np.testing.assert_array_equal(posterior["certificate"].values[0], draws["w_query"][:, 0])
    assert posterior["margin"].dims[2:] == ("margin_dim_0", "margin_dim_1")
    assert len({posterior[name].dims[2] for name in draws}) == 2
    assert "support_tokens" not in tree.children


@pytest.mark.slow
def test_sequences_may_be_shorter_than_the_block():
    config = LanguageModelConfig(layers=1, heads=1, width=4, block=7, prior_rank=2)
    objective = ObjectiveConfig("margin")
    model = partial(
        language_model, vocabulary_size=5, config=config, objective=objective, margins=True
    )
    shapes = parameter_shapes(5, config, objective)
    draws = {name: 0.1 * RNG.normal(size=(3, *leaf.shape)) for name, leaf in shapes.items()}
    tokens = RNG.integers(0, 5, (2, 4))
    tree = to_datatree(draws, model=model, model_args=(tokens, tokens))
    posterior = tree["posterior"].to_dataset()
    assert posterior["margin"].sizes["position"] == 4
    assert posterior["position_embedding"].dims[2:] == ("position_embedding_dim_0", "embed")
    assert posterior["position_embedding"].shape == (1, 3, 7, 4)


@pytest.mark.parametrize("draws_in", ["float32", "float64"])
@pytest.mark.parametrize("x64", [False, True])
def test_no_precision_of_the_process_warns_or_truncates(draws_in, x64):
    def model(y):
        level = numpyro.sample("level", dist.Normal(0.0, 1.0))
        y = jnp.asarray(y, y.dtype)  # which warns where the type is not available
        numpyro.sample("y", dist.Normal(level, jnp.ones((), y.dtype)), obs=y)

    y = jnp.asarray(Y)
    assert y.dtype == np.float64
    draws = {"count": np.arange(4).reshape(1, 4), "level": np.ones((1, 4), draws_in)}
    with jax.enable_x64(x64):
        given = PosteriorResult("nuts", draws, model, (y,))
        for tree in (
            to_datatree(given, log_likelihood=True, prior=1),
            to_datatree({"level": draws["level"]}, model=model, model_args=(y,)),
        ):
            assert tree["posterior"]["level"].dtype == draws_in
            assert tree["observed_data"]["y"].dtype == draws_in


def test_a_model_without_latent_sites_is_refused():
    def model():
        numpyro.sample("y", dist.Normal(0.0, 1.0), obs=1.0)

    message = refusal(ValueError, sample, model, config=SampleConfig(warmup=1, draws=1))
    assert "the model has no latent sample site" in message
    assert "no latent sample site" in refusal(ValueError, to_datatree, {}, model=model)
    found = refusal(ValueError, to_datatree, {"y": np.ones((1, 3))}, model=model)
    assert "no latent sample site" in found


def test_what_is_not_of_the_model_is_refused():
    export = partial(to_datatree, model=grouped, model_args=(Y,))
    few = {name: value for name, value in GROUPED.items() if name != "g"}
    assert "the samples have no g: expected every latent site" in refusal(ValueError, export, few)
    for wrong in (np.ones((7, 5)), np.ones(4), np.ones((1, 2, 3, 4)), np.ones((6, 4))):
        message = refusal(ValueError, export, GROUPED | {"g": wrong})
        assert f"samples of g have shape {wrong.shape}: expected (draws, ...)" in message
    assert "model is None and the dict has none" in refusal(ValueError, to_datatree, GROUPED)
    assert "source is list [1]: expected a run" in refusal(ValueError, to_datatree, [1])
    result = PosteriorResult("nuts", {"b": np.ones((1, 2, 3))}, grouped, (Y,))
    message = refusal(ValueError, to_datatree, result, model=grouped)
    assert "a PosteriorResult has its own model" in message
    guide = AutoNormal(grouped)
    message = refusal(ValueError, export, GROUPED, guide=guide)
    assert "source is a dict and guide a AutoNormal: expected a guide beside" in message
    mcmc = MCMC(NUTS(grouped), num_warmup=1, num_samples=1)
    assert "the MCMC has no samples" in refusal(ValueError, to_datatree, mcmc)


@pytest.mark.slow
def test_an_mcmc_is_exported_as_arviz_does_with_margins_beside():
    for model, arguments in ((grouped, (Y,)), (attention, (X,))):
        mcmc = MCMC(
            NUTS(model),
            num_warmup=20,
            num_samples=30,
            num_chains=2,
            progress_bar=False,
            chain_method="vectorized",
        )
        fields = ("num_steps", "potential_energy", "energy", "accept_prob", "adapt_state.step_size")
        mcmc.run(jax.random.key(0), *arguments, extra_fields=fields)
        ours = to_datatree(mcmc, log_likelihood=True)
        theirs = az.from_numpyro(mcmc, log_likelihood=True)
        assert ours.attrs["inference_method"] == "nuts"
        for name, value in theirs["posterior"].data_vars.items():
            np.testing.assert_allclose(ours["posterior"][name], value, rtol=1e-9, err_msg=name)
            if model is grouped:
                assert ours["posterior"][name].dims == value.dims
        assert set(theirs["sample_stats"].data_vars) - {"reached_max_tree_depth"} == set(
            ours["sample_stats"].data_vars
        )
        for name in ("lp", "diverging", "n_steps", "step_size", "acceptance_rate"):
            np.testing.assert_array_equal(ours["sample_stats"][name], theirs["sample_stats"][name])
        for name, value in ours["log_likelihood"].data_vars.items():
            expected = theirs["log_likelihood"][name]
            np.testing.assert_allclose(value, expected, rtol=1e-6, err_msg=name)
        if model is grouped:
            assert len(az.summary(ours, var_names=["b"])) == 3
    support = ours["support_tokens"]["support_probability"]
    np.testing.assert_allclose(support.sum("position"), 1)


@pytest.mark.slow
def test_guides_are_exported_from_what_svi_returns():
    def own_guide(x):
        loc = numpyro.param("loc", jnp.zeros((2, 2)))
        numpyro.sample("a", dist.Normal(loc, 0.1).to_event(2))

    for guide, extra in ((AutoNormal(attention), {}), (own_guide, {"model": attention})):
        svi = SVI(attention, guide, numpyro.optim.Adam(0.01), Trace_ELBO())
        result = svi.run(jax.random.key(1), 50, X, progress_bar=False)
        export = partial(to_datatree, result, guide=guide, model_args=(X,), draws=12, **extra)
        tree, again, other = export(), export(), export(seed=1)
        assert tree["posterior"]["a"].shape == (1, 12, 2, 2)
        assert tree["posterior"]["margin"].shape == (1, 12, 3, 5)
        assert again["posterior"].identical(tree["posterior"])
        assert not other["posterior"].identical(tree["posterior"])
        assert "sample_stats" not in tree.children
    message = refusal(ValueError, to_datatree, result, model=attention)
    assert "source is a SVIRunResult and guide a NoneType: expected a guide beside" in message
    point = AutoDelta(attention)
    result = SVI(attention, point, numpyro.optim.Adam(0.01), Trace_ELBO()).run(
        jax.random.key(1), 5, X, progress_bar=False
    )
    export = partial(to_datatree, model_args=(X,))
    assert "AutoDelta, a point without draws" in refusal(ValueError, export, result, guide=point)
    # The way that the message names.
    median = {name: value[None] for name, value in point.median(result.params).items()}
    assert export(median, model=attention)["posterior"]["margin"].shape == (1, 1, 3, 5)


@pytest.mark.slow
def test_predictions_of_latent_models_are_what_a_rootogram_takes():
    config = LatentEmbeddingsConfig(width=2, sequences=3, length=4, coupling="free")
    model = partial(latent_embeddings, vocabulary_size=4, config=config)
    draws = {
        "free_coupling": 0.1 * RNG.normal(size=(25, 2, 2)),
        "emission": RNG.normal(size=(25, 2, 4)),
        "emission_bias": RNG.normal(size=(25, 4)),
        "embeddings": RNG.normal(size=(25, 3, 4, 2)),
    }
    tokens = RNG.integers(0, 4, (3, 4)).astype(np.uint8)
    export = partial(
        to_datatree, draws, model=model, model_args=(tokens,), posterior_predictive=True
    )
    tree, flat = export(), export(flat=True)
    assert tree["posterior_predictive"]["tokens"].dims[2:] == ("sequence", "position")
    found = flat["posterior_predictive"]["tokens"]
    assert found.dims == ("chain", "draw", "tokens_entry")
    np.testing.assert_array_equal(
        found.values.reshape(1, 25, 3, 4), tree["posterior_predictive"]["tokens"].values
    )
    np.testing.assert_array_equal(flat["observed_data"]["tokens"].values, tokens.ravel())
    assert az.plot_ppc_rootogram(flat) is not None
