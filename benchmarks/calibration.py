"""Simulation-based calibration of the two models of embeddings (Talts et al. 2018).

Parameters and data are drawn from the model, the posterior given the data is sampled, and the rank
of the true value among the draws is noted: where density and sampler agree with the simulation,
ranks are uniform. The test is one of their mean, in which a weak lean shows first; a chi-square
test of ten bins stands beside it. In the regimes without guarantee, data come from the root that
continuation from A = 0 reaches, and the ranks show what a density that is none does.

A run that is repeated with the same sizes goes on where it was interrupted.

With --without-log-det the log determinant is taken out of the density, but not out of the
simulation: which quantities notice?

    python benchmarks/calibration.py [--replications 1000] [--only "latent bounded"]
"""

import argparse
import json
import os
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from harness import environment
from jax import lax
from matplotlib.figure import Figure
from numpyro.handlers import seed, substitute, trace
from scipy.stats import binom, chisquare, norm
from tqdm import tqdm

from probattn import CausalAttention, log_det
from probattn.inference import SampleConfig
from probattn.inference.figures.style import (
    DOUBLE,
    add_legend,
    label_axes,
    line_style,
    new_figure,
    save_figure,
    styled,
)
from probattn.inference.sampling.chains import KERNELS
from probattn.models import LatentEmbeddingsConfig, latent_embeddings, observed_embeddings
from probattn.models.attention_sites import record_margins
from probattn.models.coupling import attention_weights_of, sample_coupling

SEQUENCES, LENGTH, WIDTH, SYMBOLS = 4, 6, 2, 5
WARMUP, RANKS, THIN = 400, 99, 10  # 99 draws, every tenth of 990, have 100 possible ranks
BINS = 10
LEVEL = 0.05  # of all tests together
_TAKEN = ("replications", "without_root")
CONTINUATION = 50  # steps from A = 0
# Steps of an iteration that leave a chain about 100 effective draws of the slowest quantity. The
# step of SGHMC has a bias of some 4 % of a variance, which so few replications do not show.
METHODS: Mapping[str, dict[str, Any]] = {
    "nuts": {},
    "mclmc": {"steps": 4},
    "sghmc": {"steps": 16, "step_size": 0.4, "friction": 0.2},
}

QUANTITIES: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "trace": lambda site: site["coupling_trace"],
    "norm": lambda site: site["coupling_norm"],
    "smallest_eigenvalue": lambda site: site["coupling_eigenvalues"][0],
    "largest_eigenvalue": lambda site: site["coupling_eigenvalues"][-1],
    "smallest_margin": lambda site: site["margin"][:, 2:].min(),
    "sum_of_log_dets": lambda site: site["log_det"].sum(),
}


class Setting(NamedTuple):
    """A model, what it observes, and the quantities whose ranks are taken."""

    model: Callable
    config: LatentEmbeddingsConfig
    data: str
    quantities: Mapping[str, Callable[[Mapping[str, Any]], Any]]
    simulate: Callable


def settings(coupling: str) -> dict[str, Setting]:
    """Return both models with this coupling."""
    config = LatentEmbeddingsConfig(
        width=WIDTH, coupling=coupling, bound=1.0, sequences=SEQUENCES, length=LENGTH
    )
    latent = partial(latent_embeddings, vocabulary_size=SYMBOLS, config=config)
    observed = partial(observed_embeddings, config=config)
    draw = continued if coupling == "free" else ancestral
    with_scale = {**QUANTITIES, "scale": lambda site: site["scale"]}
    return {
        f"latent {coupling}": Setting(latent, config, "tokens", QUANTITIES, draw),
        f"observed {coupling}": Setting(observed, config, "embeddings", with_scale, draw),
    }


def in_a_plate_of_rows(setting: Setting) -> Setting:
    """Write the observed setting with the plate that stochastic methods need, of all rows."""

    def model(embeddings: jax.Array) -> None:
        bound = setting.config.context_bound
        coupling = sample_coupling(setting.config.coupling, WIDTH, bound)
        weights = attention_weights_of(coupling)
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
        process = CausalAttention(*weights, scale, LENGTH, bound=bound)
        with numpyro.plate("sequences", SEQUENCES, subsample_size=SEQUENCES) as rows:
            numpyro.sample("embeddings", process, obs=embeddings[rows])
        record_margins(embeddings, *weights, bound)

    return setting._replace(
        model=model, simulate=lambda _, rng_key: setting.simulate(setting.model, rng_key)
    )


def without_log_det(setting: Setting) -> Setting:
    """Take the log determinant out of the density that is sampled, not out of the simulation.

    For the proper couplings, where no determinant is negative.
    """

    def model(*args: Any) -> None:
        with trace() as sites:
            setting.model(*args)
        numpyro.factor("taken_out", -sites["log_det"]["value"].sum())

    return setting._replace(
        model=model, simulate=lambda _, rng_key: setting.simulate(setting.model, rng_key)
    )


def ancestral(model: Callable, rng_key: jax.Array) -> dict[str, Any]:
    """Draw all sites of the model."""
    return _values(seed(model, rng_key))


def continued(model: Callable, rng_key: jax.Array) -> dict[str, Any]:
    """Draw all sites; of several roots, take the one that continuation from A = 0 reaches."""
    prior_key, noise_key, data_key = jax.random.split(rng_key, 3)
    prior = _values(seed(model, prior_key))
    names = ("free_coupling", "emission", "emission_bias", "scale")
    parameters = {name: prior[name] for name in names if name in prior}
    e = jax.random.normal(noise_key, (SEQUENCES, LENGTH, WIDTH)) * prior.get("scale", 1.0)
    x = jax.vmap(partial(_continuation, coupling=prior["coupling"]))(e)
    sites = _values(seed(substitute(model, {**parameters, "embeddings": x}), data_key))
    sign, _ = log_det(x, *attention_weights_of(prior["coupling"]))
    lost = jnp.any(sign <= 0) | ~jnp.all(jnp.isfinite(x))
    return {**sites, "lost": lost}


def calibrate(
    setting: Setting,
    *,
    replications: int,
    config: SampleConfig,
    seed: int = 0,
    thin: int = THIN,
    description: str = "",
) -> dict[str, Any]:
    """Rank the true values among draws, and test that the ranks are uniform."""

    def replicate(rng_key: jax.Array) -> tuple[dict, jax.Array, jax.Array]:
        truth_key, chain_key = jax.random.split(rng_key)
        truth = setting.simulate(setting.model, truth_key)
        data = truth[setting.data]
        kernel = KERNELS[config.method](setting.model, ((data,), {}), config, {})
        state = kernel.init(chain_key, jnp.int32(0))
        state = lax.fori_loop(0, config.warmup, lambda _, state: kernel.step(state), state)

        def one(_: Any, carry: tuple) -> tuple:
            state, diverging = carry
            state = kernel.step(state)
            return state, diverging + kernel.statistics(state)["diverging"]

        def keep(state: Any, _: None) -> tuple:
            state, diverging = lax.fori_loop(0, thin, one, (state, jnp.int32(0)))
            sites = _values(substitute(setting.model, kernel.draw(state)), data)
            return state, ({name: of(sites) for name, of in setting.quantities.items()}, diverging)

        _, (draws, diverging) = lax.scan(keep, state, None, length=RANKS)
        ranks = {name: jnp.sum(draws[name] < of(truth)) for name, of in setting.quantities.items()}
        return ranks, diverging.sum(), truth.get("lost", jnp.bool_(False))

    keys = jax.random.split(jax.random.key(seed), replications)
    compiled = jax.jit(replicate).lower(keys[0]).compile()

    def run(key: jax.Array) -> tuple:
        with jax.enable_x64(True):
            return jax.tree.map(np.asarray, compiled(key))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = list(tqdm(pool.map(run, keys), total=replications, desc=description, disable=None))
    kept = [(ranks, diverging) for ranks, diverging, lost in found if not lost]
    return {
        "replications": len(kept),
        "without_root": len(found) - len(kept),
        "diverging_draws": int(sum(diverging for _, diverging in kept)),
        "draws": len(kept) * RANKS * thin,
        "quantities": {
            name: _uniformity([int(ranks[name]) for ranks, _ in kept])
            for name in setting.quantities
        },
    }


def _uniformity(ranks: list[int]) -> dict[str, Any]:
    counts = np.bincount(np.array(ranks) * BINS // (RANKS + 1), minlength=BINS)
    # Ranks 0 .. RANKS have the mean RANKS / 2 and the variance ((RANKS + 1)^2 - 1) / 12.
    error = np.sqrt(((RANKS + 1) ** 2 - 1) / 12 / len(ranks))
    lean = float((np.mean(ranks) - RANKS / 2) / error)
    return {
        "counts": counts.tolist(),
        "mean_rank": float(np.mean(ranks)),
        "standard_errors": round(lean, 3),
        "p_value": float(2 * norm.sf(abs(lean))),
        "p_value_of_bins": float(chisquare(counts).pvalue),
    }


def _values(model: Callable, data: Any = None) -> dict[str, Any]:
    sites = trace(model).get_trace(data)
    return {name: site["value"] for name, site in sites.items() if "value" in site}


def _continuation(e: jax.Array, coupling: jax.Array) -> jax.Array:
    """Follow a root of x_t - mu_t(x_t) = e_t for every t from A = 0 by Newton's method."""

    def token(values: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
        past = jnp.arange(LENGTH) < t

        def error(x: jax.Array, strength: jax.Array) -> jax.Array:
            weights = jax.nn.softmax(strength * (values @ coupling @ x), where=past)
            return x - weights @ values - e[t]

        def stage(number: jax.Array, x: jax.Array) -> jax.Array:
            at = partial(error, strength=number / CONTINUATION)
            return lax.fori_loop(
                0, 5, lambda _, x: x - jnp.linalg.solve(jax.jacfwd(at)(x), at(x)), x
            )

        # At A = 0 attention is uniform, and the equation solved by one step.
        x = lax.fori_loop(0, CONTINUATION + 1, stage, e[t])
        solved = jnp.max(jnp.abs(error(x, jnp.ones(())))) < 1e-8
        return values.at[t].set(jnp.where(solved, x, jnp.nan)), None

    return lax.scan(token, jnp.zeros_like(e), jnp.arange(LENGTH))[0]


@styled
def rank_histograms(found: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw ranks of the true value over those expected, with 99 % of uniform ones in a band."""
    columns = max(1, len(found) // 2)
    figure = new_figure(DOUBLE, 0.6 + 1.7 * -(-len(found) // columns), layout="constrained")
    panels = figure.subplots(-(-len(found) // columns), columns, squeeze=False, sharey=True)
    entries: dict[str, Any] = {}
    # A column for each coupling, and a row for each model.
    names = sorted(found, key=lambda name: name.split()[0] != "latent")
    for number, (axes, name) in enumerate(zip(panels.flat, names, strict=True)):
        replications = found[name]["replications"]
        low, high = binom(replications, 1 / BINS).ppf([0.005, 0.995]) * BINS / replications
        axes.axhspan(low, high, color="0.9", linewidth=0)
        for index, (quantity, row) in enumerate(found[name]["quantities"].items()):
            heights = np.array(row["counts"]) * BINS / replications
            style = line_style(index) | {"marker": ""}
            (line,) = axes.plot(np.arange(BINS) + 0.5, heights, **style)
            entries[quantity.replace("_", " ")] = line
        label_axes(axes, number, "rank, tenths", "count / expected", title=name)
    add_legend(figure, entries)
    return figure


def main() -> None:
    """Run all settings and write the result, after each of them what there is."""
    parser = argparse.ArgumentParser(description="simulation-based calibration")
    parser.add_argument("--replications", type=int, default=1000, help="of a proper coupling")
    parser.add_argument("--free", type=int, default=320, help="replications of a free coupling")
    parser.add_argument("--only", help="one setting, such as 'latent bounded'")
    parser.add_argument("--method", choices=METHODS, default="nuts", help="the sampler")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warmup", type=int, default=WARMUP)
    parser.add_argument(
        "--without-log-det",
        action="store_true",
        help="take the log determinant out of the density of the proper couplings; needs --out",
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.without_log_det and options.out is None:
        parser.error("--without-log-det: give --out a file, so that no calibration is replaced")
    file = "calibration.json" if options.method == "nuts" else f"calibration_{options.method}.json"
    out = options.out or Path(__file__).parent / "results" / file
    config = SampleConfig(method=options.method, warmup=options.warmup, **METHODS[options.method])
    chosen = {
        name: setting
        for name, setting in settings_of(config, without=options.without_log_det).items()
        if options.only in (None, name)
    }
    if not chosen:
        parser.error(f"--only: got {options.only!r}, expected such as 'latent bounded'")
    results: dict[str, Any] = {
        "size": {
            "sequences": SEQUENCES,
            "length": LENGTH,
            "width": WIDTH,
            "symbols": SYMBOLS,
            "bound": 1.0,
            "method": options.method,
            **METHODS[options.method],
            "warmup": options.warmup,
            "draws": RANKS * THIN,
            "thinned_to": RANKS,
            "bins": BINS,
            "seed": options.seed,
            "without_log_det": options.without_log_det,
        },
        "environment": environment(),
    }
    found: dict[str, Any] = {}
    if out.exists():
        earlier = json.loads(out.read_text(encoding="utf-8"))
        if earlier["size"] == results["size"]:
            found = earlier["settings"]
    for name, setting in chosen.items():
        replications = options.free if name.endswith("free") else options.replications
        if name in found and sum(found[name][key] for key in _TAKEN) == replications:
            continue
        found[name] = calibrate(
            setting,
            replications=replications,
            config=config,
            seed=options.seed + zlib.crc32(name.encode()),  # no two settings have the same draws
            description=name,
        )
        out.write_text(json.dumps(results | summary(found), indent=2) + "\n", encoding="utf-8")
        print(name, found[name]["diverging_draws"], "diverging draws")
        for quantity, row in found[name]["quantities"].items():
            print(f"  {quantity:20s} p = {row['p_value']:.4f}  {row['counts']}", flush=True)
    save_figure(rank_histograms(found), out.with_suffix(".png"))
    print("wrote", out)


def settings_of(config: SampleConfig, *, without: bool) -> dict[str, Setting]:
    """Return the settings of a sampler by name; without the log determinant the proper ones."""
    proper = {**settings("bounded"), **settings("repulsive")}
    if without:
        return {name: without_log_det(setting) for name, setting in proper.items()}
    if config.is_stochastic:
        return {
            name: in_a_plate_of_rows(setting)
            for name, setting in proper.items()
            if setting.data == "embeddings"
        }
    return proper | (settings("free") if config.method == "nuts" else {})


def summary(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Test all quantities of the proper couplings together."""
    p_values = [
        row["p_value"]
        for name, result in found.items()
        if not name.endswith("free")
        for row in result["quantities"].values()
    ]
    level, smallest = LEVEL / max(1, len(p_values)), min(p_values, default=1.0)
    return {
        "settings": found,
        "tests": len(p_values),
        "level_of_each": level,
        "smallest_p_value": smallest,
        "uniform": smallest >= level,
    }


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main()
