"""Peak resident memory and time of exporting a large posterior with margins, in a fresh process."""

import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpyro.handlers import seed, trace

from probattn.inference import PosteriorResult, to_datatree
from probattn.models import LatentEmbeddingsConfig, latent_embeddings

CHAINS, DRAWS = 4, 1000
SEQUENCES, LENGTH, WIDTH, SYMBOLS = 200, 32, 3, 64
BAR = 2 * 2**30  # bytes


def export_memory(rounds: int, *, draws: int = DRAWS, sequences: int = SEQUENCES) -> dict[str, Any]:
    """Measure peak resident bytes by stage, and seconds of `to_datatree` and `to_netcdf`.

    It is measured once: memory varies little, and a round takes minutes.
    """
    del rounds
    child = [sys.executable, __file__, str(draws), str(sequences)]
    output = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(output.splitlines()[-1])
    peak, imports = found["peak_bytes"]["to_netcdf"], found["peak_bytes"]["imports"]
    return {
        "chains": CHAINS,
        "draws": draws,
        "sequences": sequences,
        "length": LENGTH,
        "d": WIDTH,
        "precision": "float64",
        **found,
        "peak_without_imports_bytes": peak - imports,
        "bar_bytes": BAR,
        "below_bar": peak < BAR,
    }


def report(results: dict[str, Any]) -> None:
    """Print a table of what `export_memory` returns."""
    for stage, size in results["peak_bytes"].items():
        seconds = results["seconds"].get(stage)
        told = "" if seconds is None else f"   {seconds:7.1f} s"
        print(f"export, peak memory up to {stage:12s} {size / 2**20:7.0f} MiB{told}")
    print(
        f"export, without imports {results['peak_without_imports_bytes'] / 2**20:.0f} MiB; "
        f"{results['file_bytes'] / 2**20:.0f} MiB on disk; "
        f"{'below' if results['below_bar'] else 'NOT below'} {results['bar_bytes'] / 2**30:.0f} GiB"
    )


def _measure(draws: int, sequences: int) -> dict[str, Any]:
    """Run the stages in order: peaks never fall, so each is of all stages up to it."""
    peaks = {"imports": _peak()}
    result = _posterior(draws, sequences)
    peaks["draws"] = _peak()
    started = time.perf_counter()
    tree = to_datatree(result)
    seconds = {"to_datatree": time.perf_counter() - started}
    peaks["to_datatree"] = _peak()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "posterior.nc"
        started = time.perf_counter()
        tree.to_netcdf(path)
        seconds["to_netcdf"] = time.perf_counter() - started
        size = path.stat().st_size
    peaks["to_netcdf"] = _peak()
    return {
        "draws_bytes": sum(value.nbytes for value in result.draws.values()),
        "peak_bytes": peaks,
        "seconds": seconds,
        "file_bytes": size,
    }


def _posterior(draws: int, sequences: int) -> PosteriorResult:
    """Make random numbers in the shapes of the sites: what they are changes no memory."""
    config = LatentEmbeddingsConfig(width=WIDTH, sequences=sequences, length=LENGTH)
    model = partial(latent_embeddings, vocabulary_size=SYMBOLS, config=config)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, SYMBOLS, (sequences, LENGTH))

    def latent() -> dict[str, jax.Array]:
        sites = trace(seed(model, jax.random.key(0))).get_trace(tokens)
        return {
            name: site["value"]
            for name, site in sites.items()
            if site["type"] == "sample" and not site["is_observed"]
        }

    return PosteriorResult(
        method="nuts",
        draws={
            name: rng.standard_normal((CHAINS, draws, *leaf.shape))
            for name, leaf in jax.eval_shape(latent).items()
        },
        model=model,
        model_args=(tokens,),
        statistics={
            "diverging": np.zeros((CHAINS, draws), bool),
            "n_steps": np.full((CHAINS, draws), 31),
            **{
                name: rng.standard_normal((CHAINS, draws))
                for name in ("acceptance_rate", "energy", "lp", "step_size")
            },
        },
    )


def _peak() -> int:
    """Return the peak of resident bytes of this program, from Linux.

    Not `resource.getrusage`: what it tells of a process starts at the peak of its parent, which
    may be larger.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status tells no VmHWM: expected a Linux kernel")


if __name__ == "__main__":
    print(json.dumps(_measure(*map(int, sys.argv[1:]))))
