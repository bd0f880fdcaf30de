"""How far a step may go without jumping over the attention barrier.

The barrier is infinite at det D_t = 0 and finite on both sides, so a step can cross it unseen. One
that makes a positive determinant of its minibatch non-positive is tried again at half its size.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_FRACTIONS = 10  # fractions of a step that are tried: the whole of it, and nine halvings


class _Trial(NamedTuple):
    """What was found: at the whole step, at its start, at half of it, and so on.

    Attributes:
        number: how many there were.
        whole: positions whose determinants were positive after the whole step.
        before: the same, before it.
        accepted: whether the last trial was of a step that crosses nowhere.
    """

    number: Int[Array, ""]
    whole: Bool[Array, "*batch T"]
    before: Bool[Array, "*batch T"]
    accepted: Bool[Array, ""]


def backtrack[Point](
    start: Point,
    stop: Point,
    *,
    certainly_inside: Callable[[Point], Bool[Array, "*batch T"]] | None,
    inside: Callable[[Point], Bool[Array, "*batch T"]],
) -> tuple[Point, Float[Array, ""]]:
    """Go from a point towards another, as far as no position that was inside gets outside.

    A position that was outside before does not count: the relaxed barrier is there to lead it
    back, and must be allowed to.

    Args:
        start: a tree of arrays.
        stop: point of the same shapes.
        certainly_inside: a cheap sufficient condition: most steps pay for nothing else. None if
            there is none.
        inside: function that tells which positions are inside.

    Returns:
        The point, and the fraction of the way: 1, 1/2, 1/4 and so on, or 0 after ten of them.
    """

    def at(fraction: Float[Array, ""]) -> Point:
        return jax.tree.map(
            lambda a, b: jnp.where(fraction == 1, b, a + fraction * (b - a)), start, stop
        )

    # One trial of everything, so that determinants stand in the program once.
    def body(trial: _Trial) -> _Trial:
        point = jax.tree.map(
            lambda a, b: jnp.where(trial.number == 1, a, b), start, at(_fraction(trial.number))
        )
        found = inside(point)
        whole = jnp.where(trial.number == 0, found, trial.whole)
        before = jnp.where(trial.number == 1, found, trial.before)
        after = jnp.where(trial.number == 1, whole, found)
        return _Trial(trial.number + 1, whole, before, ~jnp.any(before & ~after))

    def unfinished(trial: _Trial) -> Array:
        return ~trial.accepted & (trial.number <= _FRACTIONS)

    everywhere = jnp.ones(jax.eval_shape(inside, stop).shape, bool)
    sure = jnp.bool_(False) if certainly_inside is None else jnp.all(certainly_inside(stop))
    trial = _Trial(jnp.int32(0), everywhere, everywhere, sure)
    trial = jax.lax.while_loop(unfinished, body, trial)
    fraction = jnp.where(trial.accepted, _fraction(trial.number - 1), 0.0)
    return at(fraction), fraction


def _fraction(number: Int[Array, ""]) -> Float[Array, ""]:
    """Return the fraction of a trial: the first is all of the step, the second its start alone."""
    return 2.0 ** -jnp.maximum(number - 1, 0).astype(jnp.float32)
