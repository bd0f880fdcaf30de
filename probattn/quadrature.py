"""Adaptive quadrature that reaches its tolerance or says that it did not.

An adaptive rule knows of what its first nodes meet. So both functions start from pieces, which the
caller makes no larger than what there is to be found.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from jaxtyping import Float

_MOST_CELLS = 2**17
_NODES = 6  # along each side of a cell


def integrate(
    function: Callable[[Float[np.ndarray, "n 1"]], Float[np.ndarray, " n"]],
    edges: Float[np.ndarray, " pieces+1"],
    *,
    tolerance: float,
) -> tuple[float, float]:
    """Integrate a function of one variable, piece by piece.

    Args:
        function: (n, 1) -> (n,).
        edges: edges of the pieces, in ascending order. What is narrower than a twentieth of a piece
            may be overlooked.
        tolerance: error aimed at, absolute or relative.

    Returns:
        The integral and the estimate of its error.

    Raises:
        RuntimeError: if the tolerance is not reached.
    """
    from scipy.integrate import cubature  # loaded in a third of a second, and rarely used

    value = error = 0.0
    share = tolerance / (len(edges) - 1)
    for low, high in pairwise(edges):
        found = cubature(function, [low], [high], rule="gk21", rtol=tolerance, atol=share)
        if found.status != "converged":
            raise RuntimeError(
                f"the integral from {low:g} to {high:g} did not reach the tolerance "
                f"{tolerance:g}: its error is estimated at {float(found.error):g}; ask for a "
                "larger tolerance, or compute in float64"
            )
        value += float(found.estimate)
        error += float(found.error)
    return value, error


def integrate_cells(
    function: Callable[[Float[np.ndarray, "n 2"]], Float[np.ndarray, " n"]],
    centres: Float[np.ndarray, "cells 2"],
    halves: Float[np.ndarray, " cells"],
    *,
    tolerance: float,
) -> float:
    """Integrate a function of two variables over squares, which are cut where it is rough.

    Args:
        function: (n, 2) -> (n,).
        centres: centres of the squares.
        halves: half their sides.
        tolerance: absolute error aimed at.

    Raises:
        RuntimeError: if the tolerance is not reached.
    """
    coarse, accepted, left = _gauss(function, centres, halves), 0.0, tolerance
    while len(centres):
        quarters, half = quartered(centres, halves)
        finer = _gauss(function, quarters, half)
        fine = finer.reshape(-1, 4).sum(1)
        error = np.abs(fine - coarse)
        if error.sum() <= left:
            return accepted + float(fine.sum())
        if len(quarters) > _MOST_CELLS:
            raise RuntimeError(
                f"the integral did not reach the tolerance {tolerance:g}: its error is estimated "
                f"at {error.sum():g}; ask for a larger tolerance"
            )
        # Of what is left of the tolerance, half is for the cells that are done with.
        rough = error > left / (2 * len(error))
        accepted += float(fine[~rough].sum())
        left -= float(error[~rough].sum())
        kept = np.repeat(rough, 4)
        centres, halves, coarse = quarters[kept], half[kept], finer[kept]
    return accepted


def quartered(
    centres: Float[np.ndarray, "cells 2"], halves: Float[np.ndarray, " cells"]
) -> tuple[Float[np.ndarray, "4*cells 2"], Float[np.ndarray, " 4*cells"]]:
    """Return the four quarters of each square, one square after the other."""
    corners = np.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    quarters = centres[:, None] + corners * halves[:, None, None] / 2
    return quarters.reshape(-1, 2), np.repeat(halves / 2, 4)


def _gauss(
    function: Callable[[Float[np.ndarray, "n 2"]], Float[np.ndarray, " n"]],
    centres: Float[np.ndarray, "cells 2"],
    halves: Float[np.ndarray, " cells"],
) -> Float[np.ndarray, " cells"]:
    """Integrate over each square by the tensor product of Gauss and Legendre's rule."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    offsets = np.stack(np.meshgrid(nodes, nodes), axis=-1).reshape(-1, 2)
    values = function((centres[:, None] + offsets * halves[:, None, None]).reshape(-1, 2))
    rule = np.outer(weights, weights).ravel()
    return halves**2 * (values.reshape(len(centres), -1) @ rule)
