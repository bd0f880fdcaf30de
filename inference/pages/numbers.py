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
    texts = [f"{value:.2e}".split("e") for value in values[finite].tolist()]  # rounded correctly
    signed = np.array([mantissa for mantissa, _ in texts], np.float64)
    exponent = np.array([exponent for _, exponent in texts], np.int64)
    mantissa = np.rint(100 * np.abs(signed)).astype(np.int64)
    zero = mantissa == 0
    least = int(exponent[~zero].min()) if (~zero).any() else 0
    code = FIRST + 2 * (_MANTISSAS * (exponent - least) + mantissa - 100) + (signed < 0)
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
