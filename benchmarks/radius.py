"""Attacks on the certified radius: is one nearer than it, and how much nearer is it than they are?

Random contexts of several shapes and regimes, in both precisions; each start of each search is an
attack. A violation is a fold that was found nearer than the radius.
"""

from functools import partial
from typing import Any

import jax
import numpy as np

from probattn import certified_radius, embedding_margin, nearest_fold

# T, d, r, and c in units of the tokens' standard deviation, or none.
SHAPES = {
    "scalar": (5, 1, 1, None),
    "pair": (3, 2, 2, None),
    "low rank": (6, 4, 1, None),
    "square": (8, 3, 3, None),
    "wide": (16, 8, 4, None),
    "bounded": (8, 3, 3, 2.0),
}
REGIMES = ("attractive", "mixed", "repulsive")
EACH = ("pair", "square")  # which are attacked in the norm of each token, too
CONTEXTS = 32  # of each shape and precision, in each round
STARTS = 16


def radius(rounds: int) -> dict[str, Any]:
    """Attack `CONTEXTS` contexts a round of every shape, in both precisions."""
    results: dict[str, Any] = {"attacks": 0, "violations": 0}
    ratios, guesses = [], []
    count = CONTEXTS * rounds
    for name, shape in SHAPES.items():
        ways = [(np.float64, True), (np.float32, True)]
        if name in EACH:
            ways.append((np.float64, False))
        for dtype, joint in ways:
            with jax.enable_x64(True):
                found, ratio, guess = _attacked(shape, dtype, joint, count)
            results["attacks"] += count * STARTS
            results["violations"] += found["violations"]
            if joint and dtype == np.float64:
                ratios.append(ratio)
                guesses.append(guess)
            way = f"{np.dtype(dtype)}, {'joint' if joint else 'each'}"
            results.setdefault(name, {})[way] = found
    results["attack / radius"] = _quantiles(np.concatenate(ratios))
    results["embedding margin / attack"] = _quantiles(np.concatenate(guesses))
    return results


def contexts(shape: tuple, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return x, W_Q and W_K, a third of them of each regime, at scales from 0.3 to 2.5."""
    length, width, rank, _ = shape
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.uniform(np.log(0.3), np.log(2.5), (count, 1, 1)))
    x = scale * rng.standard_normal((count, length, width))
    w_query, other = rng.standard_normal((2, count, width, rank)) / np.sqrt(width)
    w_query *= rank**0.5  # so that the coupling does not depend on the rank
    regime = np.arange(count)[:, None, None] % len(REGIMES)
    part = w_query / rank**0.5
    w_key = np.where(
        regime == 0, part + 0.3 * other, np.where(regime == 1, other, 0.5 * other - part)
    )
    return x, w_query, w_key


def _attacked(
    shape: tuple, dtype: type, joint: bool, count: int
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Return the figures of one shape, and two ratios for each fold that was found."""
    bound = shape[3]
    inputs = tuple(part.astype(dtype) for part in contexts(shape, count, seed=int(joint)))
    # Programs that run once.
    jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    proved = jit(partial(certified_radius, bound=bound, joint=joint))(*inputs)[:, -1]
    search = partial(nearest_fold, key=jax.random.key(0), starts=STARTS, bound=bound, joint=joint)
    attacked, _ = jit(search)(*inputs)
    guess = jit(partial(embedding_margin, bound=bound))(*inputs)[:, -1]
    proved, attacked, guess = (np.asarray(part, np.float64) for part in (proved, attacked, guess))
    used = (attacked > 0) & np.isfinite(attacked)  # it is 0 where x lies beyond the boundary
    with np.errstate(divide="ignore"):
        ratio = attacked[used] / proved[used]
    figures = {
        "contexts": count,
        "folds": int(used.sum()),
        "radius zero": int(np.sum(proved[used] == 0)),
        "violations": int(np.sum(attacked < proved)),
        "attack / radius": _quantiles(ratio),
    }
    return figures, ratio, guess[used] / attacked[used]


def _quantiles(values: np.ndarray) -> dict[str, float]:
    names = ("smallest", "5 %", "median", "95 %")
    return {
        name: float(f"{value:.4g}")
        for name, value in zip(
            names, np.quantile(values, [0, 0.05, 0.5, 0.95], method="lower"), strict=True
        )
    }


def report(results: dict[str, Any]) -> None:
    """Print what `radius` returns."""
    print(f"radius: {results['attacks']} attacks, {results['violations']} violations")
    for name in ("attack / radius", "embedding margin / attack"):
        print(f"radius, {name}: {results[name]}")
    for name in SHAPES:
        for how, found in results[name].items():
            print(
                f"radius, {name:9s} {how:15s} {found['folds']:5d} folds, "
                f"attack / radius {found['attack / radius']}"
            )
