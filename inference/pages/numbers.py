"""Numbers of three significant digits in few bytes."""

import numpy as np
from jaxtyping import Float, Integer, UInt8

# Codes of what has no digits, and the first of all others. The script of the page knows them, too.
NAN, MINUS_INFINITY, INFINITY, ZERO, FIRST = range(5)
_MANTISSAS = 900  # 100 to 999


def codes(values: Float[np.ndarray, " N"]) -> tuple[Integer[np.ndarray, " N"], int]:
    """Return a whole number for each value, rounded to three significant digits as Python rounds.

    The value m * 10^(e - 2), with m from 100 to 999, has the code
    FIRST + 2 (900 (e - least) + m - 100), and one more if it is negative.

    Args:
        values: (N,), of any floating type.

    Returns:
        The codes, (N,), and `least`, the smallest exponent e.
    """
    found = np.empty(len(values), np.int64)
    found[np.isnan(values)] = NAN
    found[values == -np.inf] = MINUS_INFINITY
    found[values == np.inf] = INFINITY
    finite = np.isfinite(values)
    # Python rounds each correctly; what is read back is within one unit in the last place of it.
    rounded = np.array([f"{value:.2e}" for value in values[finite].tolist()], np.float64)
    zero = rounded == 0
    size = np.abs(np.where(zero, 1.0, rounded))
    exponent = np.floor(np.log10(size)).astype(np.int64)
    mantissa = np.rint(size / 10.0 ** (exponent - 2)).astype(np.int64)
    for off, step in ((mantissa >= 1000, 1), (mantissa < 100, -1)):  # of an inexact logarithm
        exponent = np.where(off, exponent + step, exponent)
    mantissa = np.rint(size / 10.0 ** (exponent - 2)).astype(np.int64)
    least = int(exponent[~zero].min()) if (~zero).any() else 0
    code = FIRST + 2 * (_MANTISSAS * (exponent - least) + mantissa - 100) + (rounded < 0)
    found[finite] = np.where(zero, ZERO, code)
    return found, least


def planes(whole: Integer[np.ndarray, " N"]) -> tuple[UInt8[np.ndarray, " bytes"], int]:
    """Return whole numbers >= 0 as planes of bytes, the lowest bytes of all first, and their count.

    Bytes of one rank beside each other compress better than numbers do.
    """
    most = int(whole.max(initial=0))
    count = max(1, -(-most.bit_length() // 8))
    of_each = [(whole >> (8 * rank) & 255).astype(np.uint8) for rank in range(count)]
    return np.concatenate(of_each), count
