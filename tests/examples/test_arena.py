"""The arena: its model and loop against the library's, its statistics, then a tiny arena."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.util import log_density
from scipy import stats
from scipy.special import logsumexp

from probattn.inference import FitConfig, RunConfig
from probattn.inference.fitting.svi import Trainer
from probattn.models import LanguageModelConfig, ObjectiveConfig
from probattn.models.decoder import layers
from probattn.models.language import language_model, sample_parameters
from probattn.models.priors import starting_point
from tests.support.project import ROOT, scripts_fixture
from tests.support.tiny_run import tiny_text

FOLDER = ROOT / "examples" / "arena"
COMMITTED = sorted(path.parent for path in FOLDER.glob("results/**/rates.csv"))
NAMES = (
    *("arena_model", "arena_training", "arena_plan", "arena_measure", "arena_results"),
    *("arena_statistics", "arena_figures", "arena_report", "arena"),
)
SYMBOLS = 5
MODEL = LanguageModelConfig(layers=2, heads=2, width=8, block=6, prior_rank=2)
FIT = FitConfig(steps=12, batch=3, warmup=4, learning_rate=0.03, eval_every=12, checkpoint_every=12)
TINY = """
[model]
layers = 1
heads = 2
width = 8
block = 8
prior_rank = 2
[fit]
steps = 60
batch = 4
learning_rate = 1e-2
warmup = 5
[study]
rates = [1e-2, 1e38]
clips = [inf]
seeds = 2
rate_seeds = 2
tokens = 64
windows = 2
bits = 3
"""


scripts = scripts_fixture(FOLDER, NAMES)


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_the_committed_table_is_that_of_the_committed_results(scripts, tmp_path, folder):
    for path in folder.iterdir():
        if path.suffix in (".csv", ".txt"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    scripts["arena_report"].write_report(tmp_path)
    made = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert made == (folder / "table.md").read_text(encoding="utf-8")


def start():
    def parameters():
        return sample_parameters(SYMBOLS, MODEL, ObjectiveConfig("ce"))

    return starting_point(jax.random.key(0), parameters)


def batch():
    return np.random.default_rng(0).integers(0, SYMBOLS, (2, 3, MODEL.block))


def joint(model, parameters, key=0, **options):
    options |= {"vocabulary_size": SYMBOLS, "config": MODEL, "num_sequences": 7}
    return log_density(seed(model, key), batch(), options, parameters)[0]


def test_the_plain_model_is_that_of_the_library(scripts):
    model, parameters = scripts["arena_model"].arena_model, start()
    found, expected = (
        jax.value_and_grad(lambda p, m=m: joint(m, p))(parameters) for m in (model, language_model)
    )
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-6)
    for name, slope in expected[1].items():
        np.testing.assert_allclose(found[1][name], slope, rtol=1e-4, atol=1e-5)


def test_a_spectral_norm_and_its_slope_are_those_of_the_decomposition(scripts):
    norm = scripts["arena_model"].spectral_norm
    matrices = np.random.default_rng(1).normal(size=(3, 8, 12))
    for given in (matrices, np.swapaxes(matrices, 1, 2)):
        u, size, vt = np.linalg.svd(given)
        found, slope = jax.vmap(jax.value_and_grad(norm))(jnp.asarray(given, jnp.float32))
        np.testing.assert_allclose(found, size[:, 0], rtol=1e-5)
        np.testing.assert_allclose(slope, u[:, :, :1] * vt[:, :1], atol=1e-4)


def test_sigma_reparam_starts_as_the_plain_network_and_forgets_sizes(scripts):
    arena, plain = scripts["arena_model"], start()
    found = arena.start_of_variant(plain, MODEL, "sigma_reparam", 0.0)
    found["mlp_in"] = 7 * found["mlp_in"]
    of_both = [
        arena.decoder_of(parameters, MODEL, variant)
        for parameters, variant in ((plain, "plain"), (found, "sigma_reparam"))
    ]
    x = of_both[0][0].embed(of_both[0][1], batch()[0])
    expected, logits = (network.logits(tree, x) for network, tree in of_both)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    found["spectral_gain"] = 2 * found["spectral_gain"]
    _, tree = arena.decoder_of(found, MODEL, "sigma_reparam")
    key = np.asarray(tree["layers"]["1"]["key"]["weights"]).reshape(8, 8)
    original = np.linalg.norm(plain["attention_in"][1, :, 8:16], 2)
    assert np.linalg.norm(key, 2) == pytest.approx(2 * original, rel=1e-5)


def test_qk_norm_normalises_queries_and_keys_of_every_head(scripts):
    arena = scripts["arena_model"]
    parameters = arena.start_of_variant(start(), MODEL, "qk_norm", 3.0)
    network, tree = arena.decoder_of(parameters, MODEL, "qk_norm")
    n = np.random.default_rng(2).normal(size=(6, 8)).astype(np.float32)
    query, key, _ = layers.project(tree["layers"]["1"], n, jnp.arange(6), network.config, 1)
    plain = n @ np.asarray(start()["attention_in"][1])
    for found, columns in ((query, plain[:, :8]), (key, plain[:, 8:16])):
        heads = columns.reshape(6, 2, 4)
        expected = 3 * stats.zscore(heads, axis=-1)
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)  # epsilon of the norm


def penalty(scripts, variant, strength, parameters, key=0):
    options = {"vocabulary_size": SYMBOLS, "config": MODEL, "variant": variant}
    model = seed(scripts["arena_model"].arena_model, key)
    sites = trace(substitute(model, data=parameters)).get_trace(
        *batch(), strength=strength, **options
    )
    return np.asarray(sites["penalty"]["fn"].log_factor), sites


def test_the_z_loss_is_the_mean_square_of_the_normaliser(scripts):
    found, sites = penalty(scripts, "z_loss", 0.3, start())
    logits = np.asarray(sites["tokens"]["fn"].base_dist.logits, np.float64)
    np.testing.assert_allclose(found, -0.3 * (logsumexp(logits, axis=-1) ** 2).sum(-1), rtol=1e-5)


def test_the_jacobian_penalty_is_the_norm_of_the_dense_jacobian_on_average(scripts):
    arena, parameters = scripts["arena_model"], start()
    network, tree = arena.decoder_of(parameters, MODEL, "plain")
    x, own = network.embed(tree, batch()[0]), tree["layers"]["0"]
    n = layers.normalise(own["attention_norm"], x, network.config)[0]

    def attention(n):
        positions = jnp.arange(len(n))
        projected = layers.project(own, n, positions, network.config, 0)
        attended = layers.attend(*projected, positions, network.config, 0)
        return layers.gather(own, attended, network.config)

    expected = 0.1 * float(jnp.sum(jax.jacobian(attention)(n) ** 2))
    draws = [-penalty(scripts, "jacobian", 0.1, parameters, key)[0][0] for key in range(60)]
    error = np.std(draws, ddof=1) / np.sqrt(len(draws))
    assert error < 0.1 * expected
    assert np.mean(draws) == pytest.approx(expected, abs=4 * error)


def test_dropout_at_rate_zero_is_the_plain_model_and_depends_on_its_key_above(scripts):
    model, parameters = scripts["arena_model"].arena_model, start()
    plain = float(joint(model, parameters))
    none = float(joint(model, parameters, variant="dropout", strength=0.0))
    assert none == pytest.approx(plain, rel=1e-6)
    some = [float(joint(model, parameters, k, variant="dropout", strength=0.5)) for k in (0, 0, 1)]
    assert some[0] == some[1] != some[2]


@pytest.mark.parametrize("name", ["ce", "margin"])
@pytest.mark.slow
def test_training_takes_the_steps_of_a_fit(scripts, name):
    training = scripts["arena_training"]
    tokens = np.random.default_rng(3).integers(0, SYMBOLS, 500).astype(np.uint8)
    options = {} if name == "ce" else {"attention": "first_layer"}
    library, unit = (
        ObjectiveConfig(name, **options, barrier_weight=None if name == "ce" else weight)
        for weight in (0.3, 1.0)
    )
    contender = training.Contender(MODEL, unit, variant="plain" if name == "ce" else None)
    found = training.train(
        *(np.uint32(0), np.float32(0.03), np.float32(np.inf)),
        training.Strengths(np.float32(0.3)),
        jnp.asarray(tokens),
        contender=contender,
        fit=FIT,
        vocabulary_size=SYMBOLS,
    )
    trainer = Trainer(RunConfig(model=MODEL, objective=library, fit=FIT), tokens, SYMBOLS)
    state, _ = trainer.advance(trainer.init(), 0, FIT.steps)
    expected = trainer.guide.median(trainer.guide_params(state))
    for name, value in expected.items():
        np.testing.assert_allclose(found.sites[name], value, rtol=1e-4, atol=1e-5)
    assert found.losses.shape == (FIT.steps,)


def test_spikes_are_counted_against_the_steps_before(scripts):
    losses = 2 + 0.01 * np.random.default_rng(4).normal(size=300)
    spikes = scripts["arena_results"].spikes
    assert spikes(losses) == 0
    losses[[30, 100, 250]] += 1.0  # the first has too few steps before it
    assert spikes(losses) == 2
    losses[251] += 0.5  # its own past has a spike, which makes it ordinary
    assert spikes(losses) == 2
    falling = np.linspace(5, 2, 300)
    falling[250] += 1.5  # above the 50 steps before it, and not above all of them
    assert spikes(falling) == 1


def results_of(scripts, losses):
    """Made-up tables: of each method the losses by seed and rate."""
    rows = [
        {"method": method, "setting": "plain", "clip": np.inf, "loss": loss}
        | {"rate": float(rate), "seed": float(number), "spikes": 0.0, "diverged": 0.0}
        for method, of_method in losses.items()
        for number, of_seed in enumerate(of_method)
        for rate, loss in zip((1, 2, 3), of_seed, strict=True)
    ]
    return scripts["arena_statistics"].Results([], rows, [], "")


def test_sensitivity_and_the_largest_rate_are_those_of_the_rules(scripts):
    module = scripts["arena_statistics"]
    losses = {
        "ce": [(3.0, 2.0, 7.0), (3.2, 2.2, 6.0)],
        "margin": [(2.2, 2.1, 2.3), (2.2, 2.1, 2.2)],
    }
    results = results_of(scripts, losses)
    found = {
        name: module.losses_by_rate(results, module.Subject(name, "plain", 1.0), np.inf)
        for name in losses
    }
    ce, margin = (module.sensitivity(each) for each in found.values())
    assert ce == pytest.approx({0: 4 - 2, 1: 3.8 - 2.2})
    assert [module.largest_rate(each) for each in found.values()] == [2, 3]
    less = module.difference(margin, ce)
    values = np.array([0.1 - 2.0, 13 / 6 - 2.1 - 1.6])
    assert less.mean == pytest.approx(values.mean())
    expected = stats.t.interval(0.95, 1, values.mean(), stats.sem(values))
    assert less.half_width == pytest.approx((expected[1] - expected[0]) / 2)
    assert not module.below_zero(less)  # of two seeds
    results.rates.pop()  # a seed that lacks a rate does not count
    whole = module.losses_by_rate(results, module.Subject("margin", "plain", 1.0), np.inf)
    assert module.sensitivity(whole).keys() == {0}


def test_every_method_has_three_values_and_the_network_of_its_seed(scripts):
    plan = scripts["arena_plan"]
    scale = plan.read_scale("small")
    methods = plan.read_methods(scale)
    assert all(len(settings) == 3 for settings in methods.values())
    runs = plan.tuning_runs(methods, scale)
    assert len({run.path for run in runs}) == len(runs) == 3 * len(methods)
    key, drawn = jax.random.key(5), {}
    for settings in methods.values():
        contender = settings[0].contender
        drawn[contender] = contender.start(key, SYMBOLS, settings[0].strengths.strength)
    first, *others = drawn.values()
    for name, value in first.items():
        assert all(np.array_equal(other[name], value) for other in others)


@pytest.mark.slow
def test_a_tiny_arena_goes_on_and_ends_with_its_tables(scripts, tmp_path, capsys):
    for name, size, number in (("a", 900, 1), ("b", 500, 2)):
        (tmp_path / f"{name}.txt").write_text(tiny_text(size, seed=number), encoding="utf-8")
    (tmp_path / "tiny.toml").write_text(TINY, encoding="utf-8")

    def run(*more):
        texts = ["--text", str(tmp_path / "a.txt"), "--test", str(tmp_path / "b.txt")]
        place = ["--runs", str(tmp_path / "runs"), "--scale", str(tmp_path / "tiny.toml")]
        return scripts["arena"].main([*texts, *place, *more])

    assert run("--only", "ce", "margin") == 0
    out = tmp_path / "runs" / "results"
    tables = {path.name: path.read_bytes() for path in out.iterdir()}
    assert tables.keys() >= {"runs.csv", "rates.csv", "geometry.csv", "curves.csv", "rates.png"}
    made = sorted((tmp_path / "runs").rglob("*.json"))
    kept = {path: path.stat().st_mtime_ns for path in made}
    lost = next(path for path in made if "rate-0.01_" in path.name and "seed-1" in path.name)
    lost.unlink()
    assert run("--only", "ce", "margin") == 0
    assert {p for p in made if p.stat().st_mtime_ns != kept[p]} == {lost}
    assert (out / "runs.csv").read_bytes() == tables["runs.csv"]
    assert (out / "table.md").read_bytes() == tables["table.md"]
    # A loss is not above the one before the first step, also of a network that diverged.
    path = next(path for path in made if "rate-1e+38" in path.name and "seed-0" in path.name)
    broken = json.loads(path.read_text())
    assert broken["bpc"]["test"] > broken["initial_bpc"]
    broken |= {"diverged": True, "bpc": {"tune": None, "test": None}}
    path.write_text(json.dumps(broken))
    assert run("--only", "ce", "margin") == 0
    results = scripts["arena_statistics"].read_results(out)
    far = [row for row in results.rates if row["rate"] == 1e38]
    assert sum(row["diverged"] for row in far) == 1
    assert all(row["loss"] == row["initial_bpc"] for row in far)
    capsys.readouterr()
    for arguments, line in (
        (["--only", "sgd"], "--only: got sgd, expected some of ce, margin"),
        (["--jobs", "0"], "--jobs: got 0, expected an integer >= 1"),
        (["--scale", "quick"], "holds runs of another scale, text or version"),
    ):
        assert run(*arguments) == 2
        assert line in capsys.readouterr().err
    assert results.tuned_reference.method == "ce"
    assert results.is_tuned(results.tuned_reference)
    common = tmp_path / "runs" / "common.txt"
    assert "margin: {'objective': 'margin'}" in common.read_text()
    common.write_text("ce: {}\n")
    assert run("--only", "ce") == 2
    assert "expected those of common.txt" in capsys.readouterr().err
    assert scripts["arena_report"].main([str(tmp_path)]) == 2
    assert "has no runs.csv" in capsys.readouterr().err
