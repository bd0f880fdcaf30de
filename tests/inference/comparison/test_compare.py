"""Comparisons: predictions and calibration by hand, margins over the same text, and refusals.

Latent models are among them: `test_particle_filter` has what they predict, and here stands how
that is scored.
"""

import csv
import math
import shutil
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from probattn import stability_margin
from probattn.inference import (
    ComparedRun,
    compare,
    guide_draws,
    load_run,
    post_hoc_prior,
    to_datatree,
)
from probattn.inference.cli import console, main, text_commands
from probattn.inference.comparison import particle_filter, predictive
from probattn.inference.comparison.particle_filter import Filtered
from probattn.inference.comparison.predictive import (
    BINS,
    MEMBERS,
    latent_predictions,
    predictions,
    reliability,
)
from probattn.inference.figures import posterior as posterior_plots
from probattn.inference.figures.report import REPORTS, compared_report
from probattn.inference.runs.files import RunError
from probattn.inference.sampling.posterior_runs import load_posterior, training_sequences
from probattn.models import LatentEmbeddingsConfig
from probattn.text.corpora import load_corpus
from tests.support.tiny_posterior import LANGUAGE, fitted_by_hand
from tests.support.tiny_run import (
    BLOCK,
    all_logits,
    files_of,
    log_softmax,
    stage_arguments,
    tiny_text,
)

DRAWS = LANGUAGE.chains * LANGUAGE.draws


@pytest.fixture(scope="module", name="runs")
def runs_fixture(tiny_run, language_run, tmp_path_factory):
    """A MAP of margin, one of ce, a guide and a sampled posterior, all on the same text."""
    folder = tmp_path_factory.mktemp("compared")
    return {
        "margin": tiny_run,
        "ce": fitted_by_hand(tiny_run, folder / "ce", name="ce"),
        "mean_field": fitted_by_hand(tiny_run, folder / "mean_field", guide="mean_field"),
        "nuts": language_run,
    }


@pytest.fixture(scope="module", name="every")
def every_fixture(runs, latent_run):
    """The comparison of all, beside a latent model of other sequences."""
    assert latent_run.config.latent.length != BLOCK
    return {each.label: each for each in compare({"latent": latent_run, **runs})}


@pytest.fixture(scope="module", name="compared")
def compared_fixture(every):
    return {label: each for label, each in every.items() if label != "latent"}


def held_out(run):
    return run.vocabulary.encode(load_corpus(run.config.data).validation)


def test_a_map_predicts_as_its_network_by_hand(tiny_run, compared):
    tokens = held_out(tiny_run)
    found, losses, right = compared["margin"].predictions, [], []
    starts = range(0, len(tokens) - 1 - BLOCK, BLOCK)
    for start in starts:
        inputs, targets = tokens[start : start + BLOCK], tokens[start + 1 : start + BLOCK + 1]
        scores = log_softmax(all_logits(tiny_run, inputs))
        losses += list(-scores[np.arange(BLOCK), targets])
        right += list(scores.argmax(1) == targets)
    # By hand without the last window, which may overlap.
    assert found.members == 1
    assert found.log_predictive_density == pytest.approx(-np.mean(losses), rel=0.02)
    bits = -found.log_predictive_density / math.log(2)
    assert found.bpc == pytest.approx(bits, rel=1e-9)  # one character for each token
    counts = found.reliability.count
    accuracy = np.nansum(found.reliability.accuracy * counts) / counts.sum()
    assert accuracy == pytest.approx(np.mean(right), abs=0.02)


def test_the_surest_tokens_are_scored_alone():
    rng = np.random.default_rng(0)
    target, confidence = rng.uniform(0.01, 1, (2, 25))
    right, characters = rng.random(25) < 0.5, rng.integers(1, 4, 25)
    found = predictive.selective(target, confidence, right, characters)
    bpc = {}
    for count in range(1, 26):
        kept = sorted(range(25), key=lambda token: -confidence[token])[:count]
        bits = -sum(math.log2(target[token]) for token in kept)
        bpc[count] = bits / sum(characters[token] for token in kept)
        for number in np.flatnonzero((25 * found.coverage).astype(int) == count):
            assert found.bpc[number] == pytest.approx(bpc[count])
            assert found.accuracy[number] == pytest.approx(np.mean(right[kept]))
    assert found.area == pytest.approx(np.mean(list(bpc.values())))
    assert found.coverage[[4, 9]].tolist() == [0.5, 1]


def test_an_ensemble_predicts_with_the_mean_of_probabilities(tiny_run):
    tokens = held_out(tiny_run)[: BLOCK + 1]
    one = {name: np.asarray(value) for name, value in tiny_run.parameters.items()}
    other = one | {"token_embedding": -one["token_embedding"]}
    members = {name: np.stack([one[name], other[name]]) for name in one}
    network = tiny_run.network
    singles = []
    for each in (one, other):
        alone = {name: value[None] for name, value in each.items()}
        singles.append(predictions(tiny_run.vocabulary, network, alone, tokens, seed=0))
    both = predictions(tiny_run.vocabulary, network, members, tokens, seed=0)
    assert both.members == 2
    # Jensen: the mean of probabilities is at least as good as the mean of log probabilities ...
    mean = np.mean([single.log_predictive_density for single in singles])
    assert both.log_predictive_density > mean
    # ... and its loss is at most log 2 above that of the better member, token by token.
    best = max(single.log_predictive_density for single in singles)
    assert both.log_predictive_density > best - math.log(2)
    again = predictions(tiny_run.vocabulary, network, members, tokens, seed=0)
    assert again.noise_absolute == both.noise_absolute
    noisier = predictions(tiny_run.vocabulary, network, members, tokens, seed=1)
    assert noisier.noise_absolute != both.noise_absolute
    assert both.selective.bpc[-1] == pytest.approx(both.bpc)
    weaker = predictions(tiny_run.vocabulary, network, members, tokens, seed=0, relative=0.1)
    assert abs(weaker.noise_relative - 1) < abs(both.noise_relative - 1)


@pytest.mark.parametrize("copies", [2, 7])
def test_copies_of_one_member_score_as_the_member(tiny_run, copies):
    """Noisy ones too: noise of their own would be averaged away by the mean over members."""
    tokens = held_out(tiny_run)
    assert len(tokens) > (predictive._BATCH + 1) * BLOCK  # of more than one call
    one = {name: np.asarray(value)[None] for name, value in tiny_run.parameters.items()}
    single, several = (
        predictions(
            tiny_run.vocabulary,
            tiny_run.network,
            {name: np.repeat(value, count, axis=0) for name, value in one.items()},
            tokens,
            seed=0,
        )
        for count in (1, copies)
    )
    assert (single.members, several.members) == (1, copies)
    for name in ("log_predictive_density", "bpc", "noise_absolute", "noise_relative"):
        assert getattr(several, name) == pytest.approx(getattr(single, name), rel=1e-10), name
    assert single.noise_absolute > 1.01
    assert single.noise_relative > 1.01


def test_reliability_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.55, 0.45], [0.52, 0.48], [0.08, 0.92]])
    found = reliability(probabilities, np.array([0, 1, 0, 1]))
    assert found.count.tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 0, 2]
    assert len(found.count) == BINS
    assert found.confidence[5] == pytest.approx(0.535)
    assert found.accuracy[5] == 0.5
    assert found.accuracy[9] == 1.0
    assert np.isnan(found.confidence[0])
    assert found.error == pytest.approx((0.035 + 0.09) / 2)
    certain = reliability(np.array([[1.0, 0.0]]), np.array([0]))
    assert certain.count[9] == 1
    assert certain.error == 0


@pytest.mark.slow
def test_margins_are_over_the_sequences_of_the_posterior(runs, compared):
    for label, stage in (("margin", "trained"), ("ce", "post hoc")):
        run = runs[label]
        inputs, _ = training_sequences(run, LANGUAGE.sequences)
        assert inputs.shape == (LANGUAGE.sequences, BLOCK)
        margin = stability_margin(*map(jnp.asarray, stage_arguments_of(run, inputs, stage)))[:, 2:]
        found = compared[label]
        assert found.margin_stage == stage
        assert found.smallest_margin == pytest.approx(float(margin.min()), rel=1e-4)
        assert found.margin_quantiles[0.5] == pytest.approx(float(np.median(margin)), rel=1e-4)
        assert found.smallest_margin_draws.shape == (1, 1)
    draws = compared["nuts"].smallest_margin_draws
    assert draws.shape == (LANGUAGE.chains, LANGUAGE.draws)
    assert compared["nuts"].smallest_margin == pytest.approx(np.median(draws))


@pytest.mark.slow
def test_margins_are_over_all_sequences_of_a_short_text(tiny_run, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text(tiny_text(400), encoding="utf-8")
    run = fitted_by_hand(tiny_run, tmp_path / "run", text=text)
    (found,) = compare({"margin": run})
    count = (len(load_corpus(run.config.data).train) - 1) // BLOCK
    assert 10 < count < 64
    arguments = stage_arguments_of(run, training_sequences(run, count)[0], "trained")
    margin = stability_margin(*map(jnp.asarray, arguments))[:, 2:]
    assert found.smallest_margin == pytest.approx(float(margin.min()), rel=1e-4)
    assert found.margin_quantiles[0.5] == pytest.approx(float(np.median(margin)), rel=1e-4)


@pytest.mark.parametrize(
    ("attention", "stage"), [("separate", "trained"), ("first_layer", "first layer")]
)
def test_a_run_whose_own_stage_is_compared_is_not_written_to(tiny_run, tmp_path, attention, stage):
    run = fitted_by_hand(tiny_run, tmp_path / "run", attention=attention)
    before = files_of(run.path)
    (found,) = compare({"run": run})
    assert found.margin_stage == stage
    assert files_of(run.path) == before
    assert "post_hoc_prior.npz" not in before


def stage_arguments_of(run, inputs, stage):
    if stage == "post hoc" and not run.config.objective.trains_attention_prior:
        prior = post_hoc_prior(run)
        tables = (np.asarray(run.parameters[f"{n}_embedding"]) for n in ("token", "position"))
        token, position = tables
        return token[inputs] + position[: inputs.shape[1]], prior.w_query, prior.w_key
    return stage_arguments(run, inputs)[stage]


def test_what_applies_to_which_run(compared):
    assert {label: run.inference for label, run in compared.items()} == {
        "margin": "map",
        "ce": "map",
        "mean_field": "mean_field",
        "nuts": "nuts",
    }
    assert compared["margin"].barrier_weight == 0.05
    assert compared["ce"].barrier_weight is None
    for label, run in compared.items():
        # Draws of a guide are not of the posterior, and say nothing of what is left out.
        of_posterior = label == "nuts"
        assert (run.elpd_loo is not None) == of_posterior
        assert (run.elpd_loo_se is not None) == of_posterior
        assert (run.pareto_k is not None) == of_posterior
        assert (run.divergences is not None) == of_posterior
        assert run.seconds > 0
    assert compared["nuts"].predictions.members == DRAWS
    assert compared["mean_field"].predictions.members == 32
    assert compared["mean_field"].smallest_margin_draws.shape[0] == 1


@pytest.mark.slow
def test_draws_of_a_guide_are_a_posterior_of_one_chain(runs):
    tree = to_datatree(runs["mean_field"], draws=6, sequences=3, seed=2, log_likelihood=True)
    posterior = tree["posterior"].to_dataset()
    assert dict(posterior["token_embedding"].sizes)["chain"] == 1
    assert posterior.sizes["draw"] == 6
    assert posterior["margin"].shape == (1, 6, 3, BLOCK)
    drawn = guide_draws(runs["mean_field"], draws=6, seed=2)
    np.testing.assert_array_equal(posterior["w_query"].values, drawn["w_query"])
    assert tree["log_likelihood"]["tokens"].shape == (1, 6, 3)
    assert tree.attrs["inference_method"] == "mean_field"
    assert "sample_stats" not in tree.children


def test_table_and_figures(compared, tmp_path):
    weaker = replace(compared["margin"], label="weaker", barrier_weight=0.01)
    paths = compared_report([*compared.values(), weaker], tmp_path)
    assert {path.name for path in paths} == set(REPORTS["compared"])
    with (tmp_path / "comparison.csv").open(newline="") as stream:
        rows = {row["run"]: row for row in csv.DictReader(stream)}
    assert set(rows) == {*compared, "weaker"}
    assert float(rows["nuts"]["smallest_margin"]) == pytest.approx(
        compared["nuts"].smallest_margin, rel=1e-6
    )
    assert rows["ce"]["elpd_loo"] == ""
    assert float(rows["margin"]["bpc"]) == pytest.approx(
        compared["margin"].predictions.bpc, rel=1e-6
    )


def test_a_curve_over_the_weight_is_of_the_stage_of_the_posterior(compared, tmp_path, monkeypatch):
    drawn, draw = [], posterior_plots.barrier_weights

    def noting(draws, weights, others):
        drawn.append((set(weights), others))
        return draw(draws, weights, others)

    monkeypatch.setattr(posterior_plots, "barrier_weights", noting)
    margin = compared["margin"]
    weaker = replace(margin, label="weaker", barrier_weight=0.01)
    heads = replace(margin, label="heads", barrier_weight=0.3, margin_stage="first layer")
    compared_report([*compared.values(), weaker, heads], tmp_path)
    [(weights, others)] = drawn
    assert weights == {margin.barrier_weight, 0.01}
    assert others["heads"] == margin.smallest_margin


def test_the_command(runs, compared, tmp_path, capsys, monkeypatch):
    asked = []

    def noting(runs, *, seed, progress):
        asked.append(({label: run.path for label, run in runs.items()}, seed))
        return [compared["margin"], compared["nuts"]]

    monkeypatch.setattr(text_commands, "compare", noting)
    paths = [str(runs[label].path) for label in ("margin", "nuts")]
    assert main(["compare", *paths, "--seed", "3", "--out", str(tmp_path / "out")]) == 0
    assert asked == [({Path(path).name: Path(path) for path in paths}, 3)]
    printed = capsys.readouterr().out
    assert "smallest margin" in printed
    assert (tmp_path / "out" / "smallest_margin.png").stat().st_size > 10_000
    assert main(["compare", paths[0], paths[0], "--out", str(tmp_path / "twice")]) == 2
    assert "expected each run once" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()


def test_runs_of_other_data_are_refused(runs, tmp_path):
    run = runs["margin"]
    with pytest.raises(ValueError, match="runs: got none, expected at least one"):
        compare({})
    other = shutil.copytree(run.path, tmp_path / "other")
    data = (other / "data.json").read_text().replace(run.data["sha256"], "0" * 64)
    (other / "data.json").write_text(data)
    with pytest.raises(RunError, match="one and two differ in the corpus: expected runs on the"):
        compare({"one": run, "two": load_run(other)})
    longer = replace(run, config=replace(run.config, model=replace(run.config.model, block=4)))
    with pytest.raises(RunError, match=r"short sees 4 tokens \(model.block\), and the sequences"):
        compare({"short": longer, "nuts": runs["nuts"]})
    fewer = runs["nuts"].config
    fewer = replace(fewer, sample=replace(fewer.sample, sequences=2))
    with pytest.raises(RunError, match="nuts has 4 sequences of 8 tokens and fewer 2 of 8"):
        compare({"nuts": runs["nuts"], "fewer": replace(runs["nuts"], config=fewer)})


@pytest.mark.slow
def test_a_latent_model_changes_nothing_of_what_is_said_of_the_others(runs, compared):
    alone = {each.label: each for each in compare(runs)}
    for label in ("margin", "nuts"):
        assert alone[label].smallest_margin == compared[label].smallest_margin
        assert alone[label].predictions.bpc == compared[label].predictions.bpc


def test_a_latent_model_is_compared_beside_language_models_of_another_block(
    every, runs, tmp_path, capsys
):
    found = every
    assert found["latent"].model == "latent"
    assert found["latent"].predictions.members == MEMBERS
    assert found["latent"].predictions.unconverged == 0
    assert np.isfinite(found["latent"].predictions.bpc)
    assert found["latent"].elpd_loo < 0 < found["latent"].elpd_loo_filter_error
    assert found["latent"].elpd_loo_filter_error < found["latent"].elpd_loo_se
    assert found["latent"].smallest_margin_draws.shape == (2, 20)
    # It changes nothing of what is said of the others.
    (alone,) = compare({"margin": runs["margin"]})
    assert alone.predictions.bpc == found["margin"].predictions.bpc
    assert alone.predictions.unconverged is None
    assert found["nuts"].predictions.unconverged is None
    paths = compared_report(list(found.values()), tmp_path)
    assert {path.name for path in paths} >= {"reliability.png", "smallest_margin.png"}
    with (tmp_path / "comparison.csv").open(newline="") as stream:
        rows = {row["run"]: row for row in csv.DictReader(stream)}
    for column in ("degradation_absolute_0.5", "degradation_relative_1"):
        assert rows["latent"][column] == ""
        assert float(rows["margin"][column]) > 0
    assert float(rows["latent"]["bpc"]) == pytest.approx(found["latent"].predictions.bpc, rel=1e-6)
    assert rows["latent"]["unconverged_particles"] == "0"
    assert rows["margin"]["unconverged_particles"] == ""
    console.print_compared(Console(width=100), [found["margin"], found["latent"]])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "noise 0.5" in line)
    assert line.split("│")[3].strip() == "-"


@pytest.mark.parametrize(("pareto_k", "warned"), [(0.71, 1), (math.nan, 1), (0.7, 0), (None, 0)])
def test_an_estimate_that_cannot_be_trusted_is_said_to_be_none(pareto_k, warned, capsys):
    runs = [ComparedRun("a", "language"), ComparedRun("b", "latent", pareto_k=pareto_k)]
    console.print_compared(Console(width=100), runs)
    assert capsys.readouterr().out.count("cannot be trusted") == warned


def test_a_latent_model_is_given_its_own_draws(latent_run, monkeypatch):
    """One of them: those at the ends and evenly between are taken, as `members_of` says."""
    given, few = [], 3

    def spy(rng_key, tokens, coupling, emission, bias, *, bound):
        given.append((coupling, emission, bias))
        assert bound == latent_run.config.latent.context_bound
        assert tokens.shape[1] == latent_run.config.latent.length
        uniform = np.full((*tokens.shape, emission.shape[1]), -math.log(emission.shape[1]))
        return Filtered(uniform, np.zeros(tokens.shape, int))

    monkeypatch.setattr(particle_filter, "filter_tokens", spy)
    monkeypatch.setattr(predictive, "MEMBERS", few)
    result = load_posterior(latent_run)
    members = {name: value.reshape(-1, *value.shape[2:]) for name, value in result.draws.items()}
    tokens = held_out(latent_run)
    config = latent_run.config.latent
    found = latent_predictions(latent_run.vocabulary, config, members, tokens, seed=0)
    assert found.members == len(given) == few
    size = latent_run.vocabulary.size
    assert found.log_predictive_density == pytest.approx(-math.log(size), rel=1e-12)
    posterior = to_datatree(latent_run)["posterior"]
    for number, name in enumerate(("coupling", "emission", "emission_bias")):
        drawn = np.stack([np.asarray(each[number]) for each in given])
        assert drawn.dtype == np.float32
        values = posterior[name].values
        expected = values.reshape(-1, *values.shape[2:])[[0, 20, 39]]
        np.testing.assert_allclose(drawn, expected, rtol=1e-5, atol=1e-6)


def test_predictions_of_latent_models_without_an_emission_by_hand(tiny_run):
    """Then every token is predicted by the biases: of an ensemble, by their mean probability."""
    tokens, size = held_out(tiny_run)[:201], tiny_run.vocabulary.size
    assert tokens[0] != tokens[-1]  # one of them is scored, the other is not
    config = LatentEmbeddingsConfig(width=2, length=BLOCK)
    rng = np.random.default_rng(0)
    bias = rng.normal(size=(2, size))
    members = {
        "repulsion": np.tril(1 + rng.random(size=(2, 2, 2))),
        "rotation": rng.normal(size=(2, 1)),
        "emission": np.zeros((2, 2, size)),
        "emission_bias": bias,
        "embeddings": np.full((2, 1), np.nan),  # of other sequences: looked at by no prediction
    }
    found = latent_predictions(tiny_run.vocabulary, config, members, tokens, seed=0)
    p = np.exp(log_softmax(bias)).mean(0)
    density = np.log(p[tokens[1:]]).mean()
    assert found.log_predictive_density == pytest.approx(density, rel=1e-6)
    assert found.bpc == pytest.approx(-density / math.log(2), rel=1e-6)  # tokens are characters
    assert found.members == 2
    assert found.noise_absolute is None
    assert found.noise_relative is None
    # Every token but the first, each once, as a language model of this block predicts them.
    one = {name: np.asarray(value)[None] for name, value in tiny_run.parameters.items()}
    of_network = predictions(tiny_run.vocabulary, tiny_run.network, one, tokens, seed=0)
    assert found.reliability.count.sum() == of_network.reliability.count.sum() == 200


def test_latent_models_of_other_sequences_are_refused(latent_run):
    config = latent_run.config
    shorter = replace(latent_run, config=replace(config, latent=replace(config.latent, length=5)))
    with pytest.raises(RunError, match="one has 3 sequences of 6 tokens and other 3 of 5: expect"):
        compare({"one": latent_run, "other": shorter})
