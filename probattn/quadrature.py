"""Adaptive quadrature that reaches its tolerance or says that it did not."""

from collections.abc import Callable

import numpy as np
from jax.typing import ArrayLike


def integrate(
    function: Callable[[np.ndarray], np.ndarray],
    low: ArrayLike,
    high: ArrayLike,
    *,
    tolerance: float,
    relative: bool = True,
) -> tuple[float, float]:
    """Integrate a function of one or two variables over a box.

    Args:
        function: (n, d) -> (n,).
        low: lower corner (d,).
        high: upper corner (d,).
        tolerance: error aimed at.
        relative: whether a relative error of this size will do as well as an absolute one.

    Returns:
        The integral and the estimate of its error.

    Raises:
        RuntimeError: if the tolerance is not reached.
    """
    from scipy.integrate import cubature  # loaded in a third of a second, and rarely used

    low, high = np.atleast_1d(low), np.atleast_1d(high)
    found = cubature(
        function,
        low,
        high,
        rule="gk21" if len(low) == 1 else "genz-malik",
        rtol=tolerance if relative else 0,
        atol=tolerance,
    )
    if found.status != "converged":
        raise RuntimeError(
            f"the integral did not reach the tolerance {tolerance:g}: its error is estimated at "
            f"{float(found.error):g}; ask for a larger tolerance"
        )
    return float(found.estimate), float(found.error)
