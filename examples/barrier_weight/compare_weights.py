"""Which weight of the barrier stands for the posterior? MAPs beside NUTS, on observed embeddings.

    python examples/barrier_weight/compare_weights.py --out runs/barrier_weight
        [--text input.txt] [--run RUN] [--coupling bounded] [--warmup 500] [--draws 1500]

Samples the posterior of the coupling A and of sigma for three data sets: simulated, Python's
language reference, and the text given with --text under the name tinyshakespeare; with --run also
the embeddings of a run, fitted or imported. Beside it stand the points that maximise the same
density with the barrier weighted by lambda, with the residual and without. Of a text it also writes
how often each token is the support token of its sequence. Leaves tables and a figure in --out;
`weighted_report.py` makes them again from the CSV files alone.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from measured import QUANTITIES, diagnose, interval, measure, mixture
from numpyro.handlers import substitute
from observed import Observed, model_of, of_run, of_text, simulated
from weighted_maps import STARTS, WeightedDensity, residual_scale
from weighted_report import write_report

from probattn import support_tokens
from probattn.inference import SampleConfig, sample
from probattn.inference.runs.csv_tables import write_table
from probattn.inference.runtime.compilation_cache import keep_compiled_programs
from probattn.models.coupling import sample_coupling
from probattn.text.corpora import DataConfig

KINDS = {"full": 1.0, "margin only": 0.0}  # weight of the residual
WEIGHTS = (0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 10.0)
DATA_SETS = ("simulated", "pydoc", "tinyshakespeare", "run")
_COUPLING_SITES = ("repulsion", "rotation", "free_coupling")
POSTERIOR = ("data", "quantity", "mean", "low", "high", "r_hat", "ess_bulk", "ess_tail")
SUPPORT = ("sequence", "position", "token", "mean margin", "support probability")
RUNS = ("data", "note", "divergences", "leapfrog_steps", "sampling_seconds")
MAPS = (
    *("data", "kind", "weight", *QUANTITIES, "coupling norm", "largest eigenvalue", "scale"),
    *("objective", "gradient norm", "agreeing", "starts"),
)


def main() -> None:
    options = _parser().parse_args()
    keep_compiled_programs(print)
    columns = {"posterior": POSTERIOR, "maps": MAPS, "runs": RUNS, "support": SUPPORT}
    with jax.enable_x64(True):
        for observed in _data_sets(options):
            tables = {}
            if "maps" in options.parts:
                tables["maps"] = _points(observed, options)
            if "posterior" in options.parts:
                tables |= _posterior(observed, options)
            for name, rows in tables.items():
                write_table(options.out / observed.name / f"{name}.csv", columns[name], rows)
    for path in write_report(options.out):
        print("wrote", path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="MAPs beside the posterior of observed embeddings")
    parser.add_argument("--out", type=Path, default=Path("runs/barrier_weight"))
    parser.add_argument("--only", nargs="+", choices=DATA_SETS, help="data sets (default: all)")
    parser.add_argument("--text", type=Path, help="UTF-8 text of the data set tinyshakespeare")
    parser.add_argument("--run", type=Path, help="run whose embeddings are taken too")
    parser.add_argument("--coupling", choices=("bounded", "repulsive", "free"), default="bounded")
    parts = ("maps", "posterior")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="what is computed")
    parser.add_argument("--weights", type=float, nargs="+", default=WEIGHTS)
    for name, number in (
        *(("width", 4), ("sequences", 24), ("length", 32), ("fit-steps", 400)),
        *(("warmup", 500), ("draws", 1500), ("starts", STARTS)),
    ):
        parser.add_argument(f"--{name}", type=int, default=number, help=f"(default {number})")
    return parser


def _data_sets(options: argparse.Namespace) -> Iterator[Observed]:
    size = (options.width, options.sequences, options.length)
    wanted = options.only or DATA_SETS
    if "simulated" in wanted:
        yield simulated(*size)
    texts = {"pydoc": DataConfig()}
    if options.text:
        texts["tinyshakespeare"] = DataConfig(source=str(options.text))
    for name, data in texts.items():
        if name in wanted:
            out = options.out / name / "fit"
            yield of_text(name, data, *size, steps=options.fit_steps, out=out)
    if options.run and "run" in wanted:
        yield of_run(options.run.name, options.run, *size)


def _points(observed: Observed, options: argparse.Namespace) -> list[tuple]:
    """Maximise every weighted density; returns rows of MAPS."""
    model, x = model_of(observed, options.coupling), jnp.asarray(observed.train)
    bound = model.keywords["config"].context_bound
    density, rows, stacked = WeightedDensity(model, x), [], []
    for kind, residual in KINDS.items():
        for weight in options.weights:
            found = density.maximise(weight, residual, starts=options.starts)
            coupling = coupling_of(found.values, options.coupling, options.width, bound)
            values = dict(found.values)
            if residual == 0:
                values["scale"] = np.float64(residual_scale(coupling, x, bound))
            stacked.append(values)
            size, symmetric = np.linalg.norm(coupling), (coupling + coupling.T) / 2
            rows.append(
                (
                    *(kind, weight, size, np.linalg.eigvalsh(symmetric)[-1], values["scale"]),
                    *(found.objective, found.gradient_norm, found.agreeing, found.starts),
                )
            )
    values = {name: np.stack([each[name] for each in stacked]) for name in stacked[0]}
    of_points = measure(model, values, observed.train, observed.held_out).quantities
    measured = zip(*(of_points[name] for name in QUANTITIES), strict=True)
    return [
        (observed.name, *row[:2], *numbers, *row[2:])
        for row, numbers in zip(rows, measured, strict=True)
    ]


def _posterior(observed: Observed, options: argparse.Namespace) -> dict[str, list]:
    """Sample the posterior and measure its draws; returns rows by the name of their table."""
    model, x = model_of(observed, options.coupling), jnp.asarray(observed.train)
    config = SampleConfig(warmup=options.warmup, draws=options.draws)
    result = sample(model, model_args=(x,), config=config, progress=True)
    of_draws = measure(model, result.draws, observed.train, observed.held_out)
    worst = diagnose(of_draws.margins)
    every = f"every margin, the worst of {of_draws.margins.shape[-1]}"
    quantities = of_draws.quantities | {"sigma": result.draws["scale"]}
    rows = [(name, *interval(each), *diagnose(each)) for name, each in quantities.items()]
    rows.append((every, *(np.nan,) * 3, *worst))
    whole = mixture(of_draws.quantities[QUANTITIES[-1]], observed.held_out[..., 0].size)
    points = {"predictive density": whole}
    if observed.truth is not None and options.coupling == "bounded":
        truth = {name: value[None] for name, value in observed.truth.items()}
        known = measure(model, truth, observed.train, observed.held_out).quantities
        points |= {f"truth, {name}": value[0] for name, value in known.items()}
    rows += [(name, point, *(np.nan,) * 5) for name, point in points.items()]
    print(f"{observed.name}: {result.divergences} divergences, every margin {worst}", flush=True)
    steps = float(result.statistics["n_steps"].mean())
    note = f"{observed.note}; coupling {options.coupling}"
    run = (observed.name, note, result.divergences, steps, result.seconds)
    tables = {"posterior": [(observed.name, *row) for row in rows], "runs": [run]}
    if observed.shown is not None:
        tables["support"] = support_rows(observed.shown, of_draws.margins)
    return tables


def support_rows(shown: np.ndarray, margins: np.ndarray) -> list[tuple]:
    """Say of every token how often it is the support token of its sequence; rows of SUPPORT.

    Args:
        shown: the tokens (N, T).
        margins: margins at the positions >= 2 of all sequences, (chains, draws, N (T - 2)).
    """
    sequences, length = shown.shape
    margins = margins.reshape(-1, sequences, length - 2)
    whole = np.concatenate([np.ones((*margins.shape[:2], 2)), margins], -1)
    chosen = np.arange(length) == np.asarray(support_tokens(whole))
    return [
        (*place, shown[place], mean, probability)
        for (place, mean), probability in zip(
            np.ndenumerate(whole.mean(0)), chosen.mean(0).flat, strict=True
        )
    ]


def coupling_of(
    values: dict[str, np.ndarray], kind: str, width: int, bound: float | None
) -> np.ndarray:
    """Return A (d, d) of the values of the sites that it is made of."""
    known = {name: values[name] for name in _COUPLING_SITES if name in values}
    return np.asarray(substitute(sample_coupling, known)(kind, width, bound))


if __name__ == "__main__":
    main()
