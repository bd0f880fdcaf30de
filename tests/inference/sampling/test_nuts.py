"""Sampling: right moments, the same draws however a run is cut, and clear refusals."""

import time
from dataclasses import replace
from functools import partial

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.handlers import substitute
from scipy import stats
from scipy.special import ndtri

from probattn import is_proper
from probattn.inference import SampleConfig, sample
from probattn.inference.runs.segments import SegmentError, SegmentFolder
from probattn.inference.runtime.signals import Interrupted
from probattn.inference.sampling import chains as chains_module
from probattn.inference.sampling import sample as sample_module
from probattn.inference.sampling.chains import SampleError
from probattn.inference.sampling.sample import fingerprint, load_draws
from probattn.models import LatentEmbeddingsConfig, latent_embeddings, observed_embeddings
from probattn.models.coupling import attention_weights_of, sample_coupling

FEW = SampleConfig(chains=2, warmup=60, draws=40, seed=3)


def model(observed=None):
    """A Gaussian with a scale: cheap to compile, with a constrained site and a vector."""
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with numpyro.plate("entries", 3):
        location = numpyro.sample("location", dist.Normal(0.0, 2.0))
        numpyro.sample("observed", dist.Normal(location, scale), obs=observed)


DATA = np.array([0.25, -1.0, 2.0])  # the same in single precision
START = {"scale": 1.5, "location": np.array([1.0, 2.0, 3.0])}


@pytest.fixture(scope="module", name="whole")
def whole_fixture():
    return sample(model, model_args=(DATA,), config=FEW)


def assert_same(one, other):
    for name in one.draws:
        np.testing.assert_array_equal(one.draws[name], other.draws[name])
    for name in one.statistics:
        np.testing.assert_array_equal(one.statistics[name], other.statistics[name])


# Moments


@pytest.mark.slow
def test_moments_are_those_of_quadrature_over_the_scale():
    """Given the scale the locations are independent Gaussians; both chains by themselves."""
    scale = np.exp(np.linspace(-4, 4, 4001))
    weight = stats.lognorm(0.5).pdf(scale) * scale  # the grid is even in log scale
    weight *= np.prod(stats.norm.pdf(DATA[:, None], 0, np.sqrt(4 + scale**2)), axis=0)
    weight /= weight.sum()
    means = weight @ (DATA * 4 / (4 + scale[:, None] ** 2))
    squares = weight @ (
        (DATA * 4 / (4 + scale[:, None] ** 2)) ** 2
        + 4 * scale[:, None] ** 2 / (4 + scale[:, None] ** 2)
    )
    result = sample(model, model_args=(DATA,), config=replace(FEW, warmup=100, draws=800))
    expected = {
        "scale": (weight @ scale, weight @ scale**2),
        "location": (means, squares),
    }
    for name, (mean, square) in expected.items():
        for chain in range(2):
            draws = result.draws[name][[chain]]
            sd = np.sqrt(square - mean**2)
            for found, moment, method in (
                (draws.mean((0, 1)), mean, "mean"),
                (draws.std((0, 1)), sd, "sd"),
            ):
                columns = draws.reshape(1, 800, -1)
                error = [
                    float(az.mcse(columns[..., entry], method=method))
                    for entry in range(columns.shape[2])
                ]
                apart = np.abs(found - moment).ravel()
                assert np.all(apart < 4 * np.array(error)), (name, chain, method, apart, error)


def test_chains_differ_and_no_draw_is_of_the_warm_up(whole):
    for name, draws in whole.draws.items():
        assert not np.any(draws[0] == draws[1]), name
    step_size = whole.statistics["step_size"]  # it changes in every iteration of the warm-up
    np.testing.assert_array_equal(step_size, np.repeat(step_size[:, :1], FEW.draws, axis=1))
    assert step_size[0, 0] != step_size[1, 0]


@pytest.mark.parametrize(
    ("chain_method", "precision"),
    [
        pytest.param("parallel", "float64", marks=pytest.mark.slow),
        ("vectorized", "float32"),
        pytest.param("vectorized", "float64", marks=pytest.mark.slow),
    ],
)
def test_a_gaussian_of_known_posterior(chain_method, precision):
    def conjugate(observed):
        location = numpyro.sample("location", dist.Normal(0.0, 2.0))
        numpyro.sample("observed", dist.Normal(location, 0.5), obs=observed)

    config = SampleConfig(
        chains=4, warmup=300, draws=1000, chain_method=chain_method, precision=precision
    )
    draws = sample(conjugate, model_args=(jnp.array(1.0),), config=config).draws["location"]
    assert draws.dtype == precision
    assert len(set(draws[:, -1])) == 4  # each chain goes its own way
    variance = 1 / (1 / 4 + 1 / 0.25)
    levels = np.arange(0.1, 1, 0.1)
    expected = variance * 4 + np.sqrt(variance) * ndtri(levels)
    error = np.array([float(az.mcse(draws, method="quantile", prob=p)) for p in levels])
    assert np.all(np.abs(np.quantile(draws, levels) - expected) < 4 * error)


@pytest.mark.slow
@pytest.mark.parametrize(
    "coupling",
    ["bounded", *(pytest.param(c, marks=pytest.mark.nightly) for c in ("repulsive", "free"))],
)
def test_moments_agree_with_quadrature(coupling):
    """Observed embeddings, d = 1, T = 4: the posterior of a and sigma by a grid over both."""
    config = LatentEmbeddingsConfig(width=1, coupling=coupling, sequences=2, length=4)
    bound = config.context_bound
    x = np.array([[0.4, -1.1, 0.9, 1.4], [-0.2, 1.3, 0.1, -0.8]])

    def log_joint(a, sigma):
        """The formulas by hand; a (n, 1) and sigma (1, m)."""
        total = np.zeros(np.broadcast_shapes(a.shape, sigma.shape))
        seen = x if bound is None else x / np.sqrt(1 + (x / bound) ** 2)
        for sequence, context in zip(x, seen, strict=True):
            for t, value in enumerate(sequence):
                mean, variance = 0.0, 0.0
                if t:
                    weights = np.exp(a[..., None] * value * context[:t])
                    weights /= weights.sum(-1, keepdims=True)
                    mean = weights @ context[:t]
                    variance = weights @ context[:t] ** 2 - mean**2
                with np.errstate(invalid="ignore", divide="ignore"):
                    total = total - ((value - mean) / sigma) ** 2 / 2 - np.log(sigma)
                    total = total + np.log(1 - a * variance)
        return np.nan_to_num(total, nan=-np.inf) - np.log(sigma) ** 2 / 2 - np.log(sigma)

    # A grid of equal prior mass in what the prior is simple in.
    level = (np.arange(4000) + 0.5) / 4000
    if coupling == "bounded":
        a = 1 + np.log(level)  # 1 - a is exponential
    elif coupling == "repulsive":
        a = 2 * np.log(level)  # minus a chi-square variable of two degrees of freedom
    else:
        a = ndtri(level)
    sigma = np.exp(np.linspace(-3, 3, 1500))
    weight = np.exp(log_joint(a[:, None], sigma[None]))
    weight *= sigma[None]  # the grid is even in log sigma
    weight /= weight.sum()

    result = sample(
        partial(observed_embeddings, config=config),
        model_args=(x[..., None],),
        config=SampleConfig(chains=4, warmup=500, draws=2000, target_accept=0.95),
    )
    drawn = result.draws["free_coupling" if coupling == "free" else "repulsion"][..., 0, 0]
    drawn = {
        "bounded": lambda factor: 1 - factor**2 / 2,
        "repulsive": lambda factor: -(factor**2),
        "free": lambda b: b,
    }[coupling](drawn)
    for draws, grid, marginal in (
        (drawn, a, weight.sum(1)),
        (result.draws["scale"], sigma, weight.sum(0)),
    ):
        mean = grid @ marginal
        sd = np.sqrt(grid**2 @ marginal - mean**2)
        for moment, expected, method in ((draws.mean(), mean, "mean"), (draws.std(), sd, "sd")):
            error = float(az.mcse(draws, method=method))
            assert abs(moment - expected) < 3 * error, (moment, expected, error)


@pytest.mark.slow
def test_draws_of_a_bounded_coupling_are_proper_and_reach_beyond_its_norm():
    """Couplings of a norm above 1 / c^2 are proper too, as long as they attract no more."""
    config = LatentEmbeddingsConfig(width=2, coupling="bounded", sequences=3, length=6)
    x = np.random.default_rng(0).normal(size=(3, 6, 2))
    result = sample(
        partial(observed_embeddings, config=config),
        model_args=(x,),
        config=SampleConfig(chains=4, warmup=400, draws=400, target_accept=0.9),
    )
    assert result.divergences == 0

    def coupling_of(draw):
        return substitute(sample_coupling, draw)("bounded", 2, config.bound)

    sites = {name: result.draws[name] for name in ("repulsion", "rotation")}
    matrices = jax.vmap(jax.vmap(coupling_of))(sites)
    weights = jax.vmap(jax.vmap(attention_weights_of))(matrices)
    assert np.all(is_proper(*weights, bound=config.bound))
    norms = np.linalg.norm(matrices, ord=2, axis=(-2, -1))
    assert np.mean(norms > 1 / config.bound**2) > 0.2
    for values in (norms, np.trace(matrices, axis1=-2, axis2=-1)):
        assert float(az.rhat(values)) < 1.02


# The same draws however a run is cut


def hold(monkeypatch, chain):
    """Make every call of that chain take longer than several of the others."""
    took = chains_module.CallLength.took

    def held(self, member, count, seconds):
        time.sleep(0.03 * (member == chain))
        took(self, member, count, seconds)

    monkeypatch.setattr(chains_module.CallLength, "took", held)


@pytest.mark.parametrize(
    "calls", [4, *(pytest.param(calls, marks=pytest.mark.slow) for calls in (1, 6))]
)
def test_interrupted_and_resumed_ends_as_uninterrupted(
    whole, tmp_path, monkeypatch, interrupt_after, calls
):
    arguments = {"model_args": (DATA,), "config": FEW, "out": tmp_path}
    with monkeypatch.context() as patch:
        interrupt_after(patch, calls)
        hold(patch, 1)  # so that the other chain is ahead of what is saved
        with pytest.raises(Interrupted, match="ended by SIGTERM; what was done is saved"):
            sample(model, **arguments)
    done = SegmentFolder(tmp_path).ranges()[-1][1]
    assert 0 < done < 100
    assert_same(sample(model, **arguments, resume=True), whole)
    assert SegmentFolder(tmp_path).ranges()[-1][1] == 100


@pytest.mark.slow
def test_draws_are_added_to_a_finished_run_which_is_then_read_and_not_sampled_again(
    whole, tmp_path, monkeypatch, interrupt_after
):
    fewer = replace(FEW, draws=25)
    sample(model, model_args=(DATA,), config=fewer, out=tmp_path)
    arguments = {"model_args": (DATA,), "config": FEW, "out": tmp_path, "resume": True}
    assert_same(sample(model, **arguments), whole)
    interrupt_after(monkeypatch, 1)
    assert_same(sample(model, **arguments), whole)


def test_another_seed_makes_other_draws(whole):
    other = sample(model, model_args=(DATA,), config=replace(FEW, seed=4))
    assert not np.any(other.draws["scale"] == whole.draws["scale"])


def test_shapes(whole):
    assert whole.draws["location"].shape == (2, 40, 3)
    assert {value.dtype for value in whole.draws.values()} == {np.dtype("float64")}
    assert np.all(whole.draws["scale"] > 0)
    assert whole.statistics["diverging"].shape == (2, 40)
    assert whole.statistics["diverging"].dtype == bool
    assert whole.divergences == whole.statistics["diverging"].sum()


@pytest.mark.slow
def test_float64_is_the_default_where_jax_is_not_in_it(whole):
    with jax.enable_x64(False):
        data = jnp.asarray(DATA, jnp.float32)
        result = sample(model, model_args=(data,), config=FEW, init_values=START)
        assert jnp.zeros(()).dtype == jnp.float32  # and it stays as it was
    assert result.draws["scale"].dtype == np.float64


def test_lp_is_the_log_density_of_each_draw(whole):
    scale, location = whole.draws["scale"], whole.draws["location"]
    log_scale = np.log(scale)
    expected = (
        -(log_scale**2) / 0.5
        - np.log(0.5 * np.sqrt(2 * np.pi))
        + np.sum(-(location**2) / 8 - np.log(2 * np.sqrt(2 * np.pi)), -1)
        + np.sum(-(((DATA - location) / scale[..., None]) ** 2) / 2, -1)
        - 3 * np.log(scale * np.sqrt(2 * np.pi))
    )
    np.testing.assert_allclose(whole.statistics["lp"], expected, rtol=1e-9)


def test_the_slowest_chain_sets_the_pace(monkeypatch):
    monkeypatch.setattr(chains_module, "CALL_SECONDS", 6.0)
    pace = chains_module.CallLength(0, (50, 90), most=12, chains=3, threads=2)
    counts, number = [], 0
    while (count := pace.next(number)) is not None:
        counts.append(count)
        number += 1
        slow = 1.0 if number < 6 else 0.1  # seconds of an iteration
        for member, seconds in ((0, 0.01), (2, slow), (1, 0.02)):
            pace.took(member, count, seconds * count)
    # Three calls on two threads take 1.5 times one: four iterations, and soon twelve, the most.
    assert counts == [1, 2, 4, 4, 4, 4, 8, 12, 11, 12, 12, 12, 4]
    assert sum(counts[:9]) == 50


def test_calls_do_not_become_long_before_the_slowest_chain_has_ended_any():
    pace = chains_module.CallLength(0, (1000,), most=400, chains=2, threads=2)
    counts = []
    for number in range(8):
        counts.append(pace.next(number))
        pace.took(0, counts[-1], 0.001)
        if number == 3:
            pace.took(1, 2, 0.001)
    assert counts == [1, 1, 1, 1, 2, 4, 8, 8]


# Where chains start


@pytest.mark.slow
def test_start_at_given_values():
    """The state of every chain before its first step, in NumPyro's unconstrained space."""
    with jax.enable_x64(True):
        state = chains_module.Chains(model, ((DATA,), {}), FEW, START).saved()
    np.testing.assert_array_equal(state["z.location"], [START["location"]] * 2)
    np.testing.assert_allclose(state["z.scale"], [np.log(1.5)] * 2, rtol=1e-15)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (
            {"sigma": 1.0},
            "init_values names sigma: expected sample sites .*, location, scale",
        ),
        ({"location": np.zeros(2)}, r"init_values has location of shape \(2,\): expected \(3,\)"),
    ],
)
def test_starts_that_do_not_fit(start, message):
    with pytest.raises(ValueError, match=message):
        sample(model, model_args=(DATA,), config=FEW, init_values=start)


@pytest.mark.slow
def test_the_old_name_of_the_initial_values_warns():
    values = {"scale": 1.5, "location": np.array([1.0, 2.0, 3.0])}
    config = SampleConfig(chains=1, warmup=0, draws=1, max_tree_depth=1)
    with pytest.warns(FutureWarning, match="start is the old name of init_values") as warned:
        old = sample(model, model_args=(DATA,), config=config, start=values)
    assert warned[0].filename == __file__
    new = sample(model, model_args=(DATA,), config=config, init_values=values)
    np.testing.assert_array_equal(old.draws["location"], new.draws["location"])
    with pytest.raises(ValueError, match="init_values and start are both given: expected one"):
        sample(model, model_args=(DATA,), config=config, start=values, init_values=values)


@pytest.mark.slow
def test_a_start_outside_the_feasible_region():
    config = LatentEmbeddingsConfig(width=1, coupling="free", sequences=2, length=4)
    free = partial(latent_embeddings, vocabulary_size=3, config=config)
    embeddings = [[-4.0, 4.0, 0.0, 0.1], [0.0, 0.1, 0.2, 0.3]]
    start = {
        "free_coupling": np.array([[0.3]]),
        "emission": np.zeros((1, 3)),
        "emission_bias": np.zeros(3),
        "embeddings": np.array(embeddings)[..., None],
    }
    message = r"log density of -inf: 2 tokens have a determinant <= 0, the smallest of -3\.8;"
    with pytest.raises(ValueError, match=message):
        sample(free, model_args=(np.zeros((2, 4), int),), config=FEW, init_values=start)


@pytest.mark.slow
def test_no_start_of_positive_density():
    def impossible():
        value = numpyro.sample("value", dist.Normal(0.0, 1.0))
        numpyro.factor("never", jnp.where(value < 99, -jnp.inf, 0.0))

    with pytest.raises(SampleError, match="chain 0, 1: 100 draws of the prior have no finite"):
        sample(impossible, config=FEW)


# Segments


@pytest.fixture(scope="module", name="stored")
def stored_fixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    short = SampleConfig(chains=2, warmup=4, draws=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_module, "SAVE_SECONDS", 0.0)  # a segment for every call
        sample(model, model_args=(DATA,), config=short, out=folder)
    return folder, short


def copied(stored, tmp_path):
    folder, config = stored
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return sorted(tmp_path.iterdir()), config


def resume(folder, config, **options):
    return sample(model, model_args=(DATA,), config=config, out=folder, resume=True, **options)


def test_a_damaged_segment_is_named(stored, tmp_path):
    files, _ = copied(stored, tmp_path)
    assert len(files) > 2
    whole = files[1].read_bytes()
    half = len(whole) // 2
    middle = slice(half - 150, half + 150)  # more than a header
    inverted = bytearray(whole)
    inverted[middle] = bytes(255 - byte for byte in inverted[middle])
    for content in (bytes(inverted), whole[:half]):
        files[1].write_bytes(content)
        with pytest.raises(SegmentError, match=rf"{files[1].name}: the segment is damaged"):
            list(SegmentFolder(tmp_path).load())


@pytest.mark.slow
def test_a_missing_segment_is_noticed_and_a_lost_end_made_again(stored, tmp_path):
    files, config = copied(stored, tmp_path)
    content = files[1].read_bytes()
    files[1].unlink()
    with pytest.raises(SegmentError, match=rf"{files[2].name}: expected a segment that begins at"):
        list(SegmentFolder(tmp_path).load())
    files[1].write_bytes(content)
    whole = load_draws(SegmentFolder(tmp_path), config)
    assert whole[3] == config.warmup + config.draws
    files[-1].unlink()
    files[1].write_bytes(content[: len(content) // 2])
    with pytest.raises(SegmentError, match=rf"{files[1].name}: the segment is damaged"):
        resume(tmp_path, config)
    files[1].write_bytes(content)
    made = resume(tmp_path, config)
    for found, expected in zip((made.draws, made.statistics), whole[:2], strict=True):
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)


OTHER_RUN = "made with another configuration or model, or given other data"
OTHER_SHAPES = "of another model, precision or number of chains"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"chains": 3}, f"{OTHER_SHAPES}: they differ", marks=pytest.mark.slow),
        pytest.param({"precision": "float32"}, OTHER_SHAPES, marks=pytest.mark.slow),
        ({"seed": 5}, OTHER_RUN),
        pytest.param({"warmup": 5}, OTHER_RUN, marks=pytest.mark.slow),
        pytest.param(
            {"draws": 3}, "and the configuration 4 of warm-up and 7 in all", marks=pytest.mark.slow
        ),
    ],
)
def test_segments_of_another_run(stored, tmp_path, change, message):
    _, config = copied(stored, tmp_path)
    with pytest.raises(SegmentError, match=message):
        resume(tmp_path, replace(config, **change))


@pytest.mark.slow
def test_segments_with_the_state_of_another_number_of_chains(stored, tmp_path):
    files, config = copied(stored, tmp_path)
    with np.load(files[0]) as stored_arrays:
        arrays = dict(stored_arrays)
    (name,) = (name for name in arrays if name.endswith("z.location"))
    np.savez(files[0], **arrays | {name: np.concatenate([arrays[name]] * 2)})
    with pytest.raises(SegmentError, match=f"{OTHER_SHAPES}: they differ in z.location;"):
        resume(tmp_path, config)


def test_more_segments_than_the_configuration_has_draws(stored):
    folder, config = stored
    with pytest.raises(SegmentError, match="and the configuration 4 of warm-up and 7 in all"):
        load_draws(SegmentFolder(folder), replace(config, draws=3))


def test_a_fingerprint_is_of_all_that_draws_depend_on():
    def of(model=model, data=DATA, **changes):
        return fingerprint(replace(FEW, **changes), model, ((data,), {})).tobytes()

    def other(observed=None):
        model(observed)

    different = [
        of(),
        of(data=DATA + 1),
        of(data=DATA[:2]),
        of(data=DATA.astype(np.float32)),
        of(seed=5),
        of(warmup=5),
        of(target_accept=0.9),
        of(other),
        of(partial(model, observed=DATA)),
        of(partial(model, observed=DATA + 1)),
        of(partial(model, DATA)),
    ]
    assert len(set(different)) == len(different)
    assert of(draws=FEW.draws + 1) == of()  # draws may be added to a run


@pytest.mark.slow
def test_segments_given_other_data(stored, tmp_path):
    _, config = copied(stored, tmp_path)
    with pytest.raises(SegmentError, match=OTHER_RUN):
        sample(model, model_args=(DATA + 1,), config=config, out=tmp_path, resume=True)


@pytest.mark.slow
def test_segments_of_a_model_with_other_arguments_bound_to_it(tmp_path):
    def normal(scale):
        numpyro.sample("value", dist.Normal(0.0, scale))

    config = SampleConfig(chains=1, warmup=2, draws=2)
    whole = sample(partial(normal, scale=2.0), config=config, out=tmp_path)
    assert_same(sample(partial(normal, scale=2.0), config=config, out=tmp_path, resume=True), whole)
    with pytest.raises(SegmentError, match="made with another configuration or model"):
        sample(partial(normal, scale=3.0), config=config, out=tmp_path, resume=True)


def test_a_posterior_too_large_for_memory():
    def wide():
        numpyro.sample("value", dist.Normal(jnp.zeros(100_000), 1.0).to_event(1))

    config = SampleConfig(chains=4, warmup=1, draws=10_000)
    with pytest.raises(ValueError, match=r"10000 draws of 4 chains of 100,000 numbers take 30 GiB"):
        sample(wide, config=config)


def test_folders_are_not_overwritten_by_mistake(stored, tmp_path):
    copied(stored, tmp_path)
    with pytest.raises(ValueError, match="holds segments already; go on with resume"):
        sample(model, model_args=(DATA,), config=FEW, out=tmp_path)
    with pytest.raises(ValueError, match="resume without out"):
        sample(model, model_args=(DATA,), config=FEW, resume=True)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("chains", 0, "sample.chains is 0: expected an integer >= 1"),
        ("warmup", -1, "sample.warmup is -1: expected an integer >= 0"),
        ("draws", 1.5, r"sample.draws is 1\.5: expected an integer >= 1"),
        ("seed", 2**32, r"sample.seed is 4294967296: expected an integer below 2\^32"),
        ("target_accept", 1.0, r"sample.target_accept is 1\.0: expected a number between 0 and 1"),
        (
            "target_accept",
            "0.8",
            r"sample.target_accept is '0\.8': expected a number between 0 and 1",
        ),
        ("adjusted", "no", "sample.adjusted is 'no': expected True or False"),
        ("chain_method", "serial", "expected one of parallel, vectorized"),
        ("precision", "half", "expected one of float64, float32"),
    ],
)
def test_configurations_that_make_no_sample(field, value, message):
    with pytest.raises(ValueError, match=message):
        replace(FEW, **{field: value})
