"""Target: values of the public array functions, in fixed shapes so that each compiles once.

Whatever a token holds, it changes no result before it, nor of another sequence; and where all is
of ordinary size the results are those of `probattn._reference`.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import probattn as pa
from probattn import _reference
from tests.robustness.fuzzing.target import Finding, Target

_SEQUENCES, _LENGTH, _WIDTH, _RANK = 2, 5, 3, 2
_SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 5e-324, 1e-310, 1e-20, 1e10, 1e155, -1e200, 1e308]
_BOUNDS = [None, 1e-3, 1.0, 1e3]
_TAME = 10.0  # size of entries up to which rounding cannot explain a difference
_CLOSE = 1e-7  # relative to the size of the blocks


def _everything(x: Any, w_query: Any, w_key: Any, bound: Any) -> dict[str, Any]:
    """Results (sequences, T, ...) of all functions of a sequence and of one of pairs."""
    sign, log_abs = pa.log_det(x, w_query, w_key, bound=bound)
    return {
        "attention_weights": pa.attention_weights(x @ w_query, x @ w_key),
        "residual": pa.residual(x, w_query, w_key, bound=bound),
        "reduced_blocks": pa.reduced_blocks(x, w_query, w_key, bound=bound),
        "jacobian_blocks": pa.jacobian_blocks(x, w_query, w_key, bound=bound),
        "determinant": sign * jnp.exp(log_abs),
        "sigma_min": pa.stability_margin(x, w_query, w_key, bound=bound),
        "reduced": pa.stability_margin(x, w_query, w_key, "reduced", bound=bound),
        "embedding_margin": pa.embedding_margin(x, w_query, w_key, bound=bound),
        "certificate": pa.certificate(x, w_query, w_key, bound=bound),
        "margin_lower_bound": pa.margin_lower_bound(x, w_query, w_key, bound=bound),
    }


def _expected(x: Any, w_query: Any, w_key: Any, bound: Any) -> dict[str, Any]:
    """The same of one sequence by definition, as far as the slow oracle has it."""
    return {
        "attention_weights": _reference.attention_weights(x @ w_query, x @ w_key),
        "residual": _reference.residual(x, w_query, w_key, bound),
        "reduced_blocks": _reference.reduced_blocks(x, w_query, w_key, bound),
        "jacobian_blocks": (blocks := _reference.jacobian_blocks(x, w_query, w_key, bound)),
        "determinant": jnp.linalg.det(blocks),
    }


def values(folder: Path) -> Target:
    """NaN, infinities, subnormal, tiny and huge numbers, and one token replaced by them."""
    del folder
    jax.config.update("jax_enable_x64", True)
    free = jax.jit(lambda *arrays: _everything(*arrays, None))
    bounded = jax.jit(_everything)
    oracle = jax.jit(jax.vmap(_expected, (0, None, None, None)))
    free_oracle = jax.jit(jax.vmap(lambda *arrays: _expected(*arrays, None), (0, None, None)))

    def check(given: tuple[int, int, int, list, Any, tuple[int, int, list[float]]]) -> str:
        seed, x_size, w_size, special, bound, (sequence, position, token) = given
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(_SEQUENCES, _LENGTH, _WIDTH)) * 10.0**x_size
        w_query, w_key = rng.normal(size=(2, _WIDTH, _RANK)) * 10.0**w_size
        for array, place, value in special:
            chosen = (x, w_query, w_key)[array]
            chosen.flat[place % chosen.size] = value
        run = free if bound is None else lambda *arrays: bounded(*arrays, bound)
        found = jax.tree.map(np.asarray, run(x, w_query, w_key))
        changed = x.copy()
        changed[sequence, position] = token
        after = jax.tree.map(np.asarray, run(changed, w_query, w_key))
        _check_causal(found, after, sequence, position)
        if not all(np.all(np.abs(array) <= _TAME) for array in (x, w_query, w_key)):
            return "causal"
        expected = (
            free_oracle(x, w_query, w_key) if bound is None else oracle(x, w_query, w_key, bound)
        )
        scale = _scale(found)
        for name, true in expected.items():
            error = np.abs(found[name] - np.asarray(true)) / scale.reshape(
                scale.shape + (1,) * (true.ndim - 2)
            )
            if not np.all(error <= _CLOSE):  # writing out the arrays takes longer than the rest
                raise Finding(f"{name} is {found[name]}, by definition {true}")
        return "causal and right"

    for bound in (None, 1.0):  # compiles before the time of an input is taken
        check((0, 0, 0, [], bound, (0, 0, [0.0] * _WIDTH)))

    numbers = st.one_of(st.sampled_from(_SPECIAL), st.floats(width=64))
    inputs = st.tuples(
        st.integers(0, 2**32 - 1),
        st.sampled_from([0, 0, 0, -3, 1, 20, 100, -100, -200]),
        st.sampled_from([0, 0, 0, -1, 5, 100, -100]),
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 99), numbers), max_size=4),
        st.sampled_from(_BOUNDS),
        st.tuples(
            st.integers(0, _SEQUENCES - 1),
            st.integers(0, _LENGTH - 1),
            st.lists(numbers, min_size=_WIDTH, max_size=_WIDTH),
        ),
    )
    return Target("values", inputs, check)


def _scale(found: dict[str, Any]) -> Any:
    """Size of the numbers that a determinant is made of, at every position."""
    size = np.max(np.abs(found["jacobian_blocks"]), axis=(-2, -1))
    size = np.maximum(size, np.max(np.abs(found["reduced_blocks"]), axis=(-2, -1)))
    return np.maximum(1, np.maximum(size**3, np.max(np.abs(found["residual"]), axis=-1)))


def _check_causal(
    before: dict[str, Any], after: dict[str, Any], sequence: int, position: int
) -> None:
    """Equal before the token and in other sequences; finite where it was finite."""
    untouched = np.ones((_SEQUENCES, _LENGTH), bool)
    untouched[sequence, position:] = False
    # Sums in another order round otherwise, and a determinant magnifies that.
    with np.errstate(all="ignore"):
        scale = _scale(before)[untouched]
    for name, old in before.items():
        one, two = old[untouched], after[name][untouched]
        if not np.array_equal(np.isfinite(one), np.isfinite(two)):
            raise Finding(f"{name} before the token, or beside it: {one} became {two}")
        if name in ("sigma_min", "reduced", "embedding_margin", "determinant"):
            continue  # of ill-conditioned blocks: their entries are compared
        finite = np.isfinite(one)
        reach = _CLOSE * np.broadcast_to(scale.reshape(-1, *[1] * (one.ndim - 1)), one.shape)
        with np.errstate(invalid="ignore"):
            near = np.abs(one - two) <= reach
        if not np.all(near[finite & np.isfinite(reach)]):
            raise Finding(f"{name}: {one} became {two}")
