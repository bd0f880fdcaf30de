"""Time and memory of drawing sequences from `CausalAttention`, by ancestral Newton steps."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from harness import CONTROL, compare

from probattn import CausalAttention, coupling, is_proper

LENGTH, WIDTH, RANK = 64, 8, 4
SEQUENCES = 1000  # of the timing
MEMORY = (500, 1000, 2000)  # sequences whose memory is compared
PRECISIONS = {"float32": False, "float64": True}


def sampling(rounds: int) -> dict[str, Any]:
    """Measure seconds of a draw of 1,000 sequences, and temporary bytes of the sampler.

    The alternatives are not rivals: their ratios to the first tell what a regime and a precision
    cost, beside the control's.
    """
    results: dict[str, Any] = {"sequences": SEQUENCES, "length": LENGTH, "d": WIDTH, "r": RANK}
    samplers = {
        f"{precision} {regime}": _sampler(precision, regime)
        for precision in PRECISIONS
        for regime in ("repulsive", "bounded")
    }
    results["draws"] = compare(samplers, rounds=rounds)
    results["temporary_bytes"] = {
        precision: {str(count): _memory(precision, count) for count in MEMORY}
        for precision in PRECISIONS
    }
    return results


def report(results: dict[str, Any]) -> None:
    """Print a table of what `sampling` returns."""
    for name, figures in results["draws"].items():
        label = f"{next(iter(results['draws']))} again" if name == CONTROL else name
        print(
            f"{results['sequences']} sequences, {label:23s} {figures['seconds']:7.3f} s   "
            f"x {figures['ratio']:.3f} ({figures['ratio_low']:.3f} to {figures['ratio_high']:.3f})"
        )
    for name, sizes in results["temporary_bytes"].items():
        table = ", ".join(f"{count}: {size / 2**20:.1f}" for count, size in sizes.items())
        print(f"temporary memory of a sampler, {name}, in MiB by sequences: {table}")


@partial(jax.jit, static_argnums=2)
def _draw(process: CausalAttention, key: jax.Array, count: int) -> jax.Array:
    return process.sample(key, (count,))


def _process(regime: str, dtype: type) -> CausalAttention:
    """Make a process: queries of order one; bounded, a positive coupling close to improper."""
    rng = np.random.default_rng(0)
    w_query = rng.standard_normal((WIDTH, RANK)) / np.sqrt(WIDTH)
    w_key, bound = -w_query, None
    if regime == "bounded":
        bound = np.sqrt(WIDTH)  # the norm of a residual, about
        size = np.linalg.norm(np.asarray(coupling(w_query, w_query)), ord=2)
        w_query, w_key = w_query * 0.95 / (size * bound**2), w_query
    w_query, w_key = w_query.astype(dtype), w_key.astype(dtype)
    if not is_proper(w_query, w_key, bound=bound):
        raise RuntimeError(f"the {regime} process of the benchmark is not proper")
    return CausalAttention(w_query, w_key, 1.0, LENGTH, bound=bound)


def _sampler(precision: str, regime: str) -> Callable[[], jax.Array]:
    with jax.enable_x64(PRECISIONS[precision]):
        process, key = _process(regime, np.dtype(precision).type), jax.random.key(0)

    def run() -> jax.Array:
        with jax.enable_x64(PRECISIONS[precision]):
            return _draw(process, key, SEQUENCES)

    if not np.isfinite(run()).all():
        raise RuntimeError(f"{precision} {regime}: draws that have not converged")
    return run


def _memory(precision: str, count: int) -> int:
    """Return temporary bytes: the regimes compile to programs of one size."""
    with jax.enable_x64(PRECISIONS[precision]):
        process, key = _process("repulsive", np.dtype(precision).type), jax.random.key(0)
        return _draw.lower(process, key, count).compile().memory_analysis().temp_size_in_bytes
