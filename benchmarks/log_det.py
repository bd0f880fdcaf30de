"""The log-determinant's value and gradient against what one would write without it."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import CONTROL, compare

from probattn import attention_weights
from probattn import log_det as ours
from probattn.blocks.elimination import eliminate

# Sequences, tokens, embedding dimensions and rank.
TRAINING, LONG = (12, 64, 128, 16), (4, 256, 256, 32)
SMALL = (16, 32, 3, 3)
# Of posteriors, in double precision.
POSTERIORS = {
    "posterior": SMALL,
    "posterior, r 4": (32, 64, 8, 4),
    "posterior, r 8": (16, 64, 16, 8),
}
MATRICES = ((16384, 8), (768, 16), (1024, 32), (256, 64))  # how many, and their rank
APART = ("elimination",)  # of matrices alone


def log_det(rounds: int) -> dict[str, Any]:
    """Compare time with `slogdet` and the autodiff Jacobian; temporary memory, and compilation."""
    results: dict[str, Any] = {}
    for name, size, dtype in (
        ("training", TRAINING, np.float32),
        ("long", LONG, np.float32),
        *((name, size, np.float64) for name, size in POSTERIORS.items()),
    ):
        with jax.enable_x64(dtype == np.float64):
            arguments = arguments_of(size, dtype)
            alternatives = {
                "slogdet": gradient_of(_slogdet),
                "log_det": gradient_of(log_abs_of),
                "each": gradient_of(_position_by_position),
            }
            if name == "training":
                alternatives["jacobian"] = gradient_of(_jacobian)
            programs, compilation = {}, {}
            for which, function in alternatives.items():
                started = time.process_time()
                programs[which] = jax.jit(function).lower(*arguments).compile()
                compilation[which] = time.process_time() - started
            found = compare(
                {which: partial(program, *arguments) for which, program in programs.items()},
                rounds=rounds,
            )
            memory = {
                which: program.memory_analysis().temp_size_in_bytes
                for which, program in programs.items()
            }
        results[name] = {
            "size": size,
            "times": found,
            "temporary_bytes": memory,
            "compile_cpu_seconds": compilation,
        }
    results["elimination"] = {
        f"{count} x {rank}": compare(
            {
                "lapack": partial(jax.jit(_lapack), blocks),
                "eliminate": partial(jax.jit(eliminate), jnp.moveaxis(blocks, 0, -1)),
            },
            rounds=rounds,
        )
        for count, rank in MATRICES
        for blocks in [_blocks(count, rank)]
    }
    return results


def report(results: dict[str, Any]) -> None:
    """Print a table of what `log_det` returns."""
    tables = {size: table for size, table in results.items() if size not in APART}
    tables |= {size: {"times": times} for size, times in results["elimination"].items()}
    for size, table in tables.items():
        for name, figures in table["times"].items():
            label = f"{next(iter(table['times']))} again" if name == CONTROL else name
            memory = table.get("temporary_bytes", {}).get(name)
            told = "" if memory is None else f"   {memory / 2**20:6.1f} MiB"
            if name in (compilation := table.get("compile_cpu_seconds", {})):
                told += f"   compiled in {compilation[name]:.1f} CPU s"
            print(
                f"log det, {size:12s} {label:14s} {1e3 * figures['seconds']:8.2f} ms  "
                f"x {figures['ratio']:.3f} "
                f"({figures['ratio_low']:.3f} to {figures['ratio_high']:.3f}){told}"
            )


def arguments_of(size: tuple[int, ...], dtype: type) -> tuple[jax.Array, ...]:
    """Draw embeddings and matrices of a size: sequences, tokens, dimensions, rank."""
    count, length, width, rank = size
    rng = np.random.default_rng(0)
    x = 0.3 * rng.standard_normal((count, length, width))
    w_query, w_key = rng.standard_normal((2, width, rank)) / math.sqrt(width)
    return tuple(jnp.asarray(array, dtype) for array in (x, w_query, w_key))


def gradient_of(log_abs: Callable) -> Callable:
    """Return value and gradient of the sum, by embeddings and both matrices."""
    return jax.value_and_grad(lambda *arguments: jnp.sum(log_abs(*arguments)), (0, 1, 2))


def log_abs_of(x: jax.Array, w_query: jax.Array, w_key: jax.Array) -> jax.Array:
    """Sum over positions, as a density and a barrier do."""
    return ours(x, w_query, w_key, summed=True)[1]


def _position_by_position(x: jax.Array, w_query: jax.Array, w_key: jax.Array) -> jax.Array:
    return ours(x, w_query, w_key)[1]


def _slogdet(x: jax.Array, w_query: jax.Array, w_key: jax.Array) -> jax.Array:
    """Take determinants of the blocks of second moments, with JAX's own derivative."""
    queries, keys = x @ w_query, x @ w_key
    rank = w_query.shape[-1]
    weights = attention_weights(queries, keys)
    products = (queries[..., :, None] * keys[..., None, :]).reshape(*x.shape[:-1], rank**2)
    moments = (weights @ products).reshape(*x.shape[:-1], rank, rank)
    means = (weights @ queries)[..., :, None] * (weights @ keys)[..., None, :]
    return jnp.linalg.slogdet(jnp.eye(rank) - (moments - means) / math.sqrt(rank))[1]


def _jacobian(x: jax.Array, w_query: jax.Array, w_key: jax.Array) -> jax.Array:
    """Take every block by autodiff, one sequence after the other to fit into memory."""

    def sequence(x: jax.Array) -> jax.Array:
        def block(t: jax.Array) -> jax.Array:
            def residual(token: jax.Array) -> jax.Array:
                logits = (x @ w_key) @ (token @ w_query) / math.sqrt(w_query.shape[-1])
                weights = jax.nn.softmax(logits, where=jnp.arange(len(x)) < t)
                return token - weights @ x

            return jax.jacfwd(residual)(x[t])

        return jnp.linalg.slogdet(jax.vmap(block)(jnp.arange(1, len(x))))[1]

    return jax.lax.map(jax.checkpoint(sequence), x)


def _blocks(count: int, rank: int) -> jax.Array:
    noise = np.random.default_rng(0).standard_normal((count, rank, rank)) / math.sqrt(rank)
    return jnp.asarray(np.eye(rank) - 0.3 * noise, jnp.float32)


def _lapack(blocks: jax.Array) -> tuple:
    return jnp.linalg.slogdet(blocks), jnp.linalg.inv(blocks)
