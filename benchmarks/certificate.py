"""The certificate against the product of two diameters, and the radius against the margin."""

import math
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import CONTROL, compare
from jax import lax
from log_det import LONG, SMALL, TRAINING, arguments_of, gradient_of

from probattn import certificate as ours
from probattn import certified_radius, stability_margin

HEAD = (4, 64, 64, 16)  # sequences, tokens, dimensions, rank: a head of `make demo`


def certificate(rounds: int) -> dict[str, Any]:
    """Compare time of the value alone, and of the value with its gradient; then the radius."""
    results: dict[str, Any] = {}
    for name, size, dtype in (
        ("training", TRAINING, np.float32),
        ("long", LONG, np.float32),
        ("posterior", SMALL, np.float64),
    ):
        with jax.enable_x64(dtype == np.float64):
            arguments = arguments_of(size, dtype)
            for kind, wrapped in (("value", jax.jit), ("gradient", gradient_of)):
                programs = {
                    which: jax.jit(wrapped(function)).lower(*arguments).compile()
                    for which, function in (("product", _product), ("certificate", ours))
                }
                found = compare(
                    {which: partial(program, *arguments) for which, program in programs.items()},
                    rounds=rounds,
                )
                results[f"{name}, {kind}"] = {"size": size, "times": found}
    for name, size in (("training", TRAINING), ("head", HEAD)):
        results[f"{name}, radius"] = {"size": size, "times": _radius(size, rounds)}
    return results


def _radius(size: tuple[int, ...], rounds: int) -> dict[str, dict[str, float]]:
    """Compare the processor time of the radius in both norms with that of the margin."""
    arguments = arguments_of(size, np.float32)
    programs = {
        which: jax.jit(partial(function)).lower(*arguments).compile()
        for which, function in (
            ("margin", stability_margin),
            ("radius", certified_radius),
            ("radius of each", partial(certified_radius, joint=False)),
        )
    }
    return compare(
        {which: partial(program, *arguments) for which, program in programs.items()},
        rounds=rounds,
        clock=time.process_time,
    )


def report(results: dict[str, Any]) -> None:
    """Print a table of what `certificate` returns."""
    for name, table in results.items():
        for which, figures in table["times"].items():
            first = next(iter(table["times"]))
            label = f"{first} again" if which == CONTROL else which
            print(
                f"certificate, {name:20s} {label:14s} {1e3 * figures['seconds']:8.2f} ms  "
                f"x {figures['ratio']:.3f} "
                f"({figures['ratio_low']:.3f} to {figures['ratio_high']:.3f})"
            )


def _product(x: jax.Array, w_query: jax.Array, w_key: jax.Array) -> jax.Array:
    """Multiply the diameters of balanced queries and keys: Gruess' bound alone."""
    (basis_q, core_q), (basis_k, core_k) = jnp.linalg.qr(w_query), jnp.linalg.qr(w_key)
    left, sizes, right = jnp.linalg.svd(core_k @ core_q.T / math.sqrt(w_query.shape[-1]))
    values = x - x[..., :1, :]
    sides = basis_q @ right.T * jnp.sqrt(sizes), basis_k @ left * jnp.sqrt(sizes)
    query, key = (_diameter(values @ side) for side in sides)
    return query * key / 4


def _diameter(points: jax.Array) -> jax.Array:
    """Return the largest distance of two points before each position, row by row."""
    rows = jnp.moveaxis(points, -2, 0)

    def farthest_before(position: jax.Array) -> jax.Array:
        squared = jnp.sum((points - rows[position][..., None, :]) ** 2, axis=-1)
        earlier = jnp.arange(points.shape[-2]) <= position
        return jnp.max(jnp.where(earlier, squared, 0.0), axis=-1)

    farthest = lax.cummax(lax.map(farthest_before, jnp.arange(points.shape[-2])), axis=0)
    shifted = jnp.concatenate([jnp.zeros_like(farthest[:1]), farthest[:-1]])
    spread = shifted != 0
    return jnp.moveaxis(jnp.where(spread, jnp.sqrt(jnp.where(spread, shifted, 1.0)), 0.0), 0, -1)
