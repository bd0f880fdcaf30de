"""The colours of margins: cividis, which keeps its order in grey and for the colour blind."""

import numpy as np
from jaxtyping import Float, Int

# Sixteenths of Matplotlib's cividis, sRGB from 0 to 255. Linear between them, it differs from the
# map by at most 13. A page draws with them, so neither it nor a notebook needs Matplotlib.
ANCHORS = (
    (0, 34, 78),
    (0, 46, 106),
    (26, 56, 111),
    (50, 67, 109),
    (67, 78, 108),
    (82, 89, 109),
    (97, 101, 111),
    (111, 112, 115),
    (124, 123, 120),
    (139, 135, 120),
    (155, 147, 118),
    (171, 160, 114),
    (187, 173, 108),
    (204, 186, 100),
    (221, 201, 88),
    (239, 215, 72),
    (254, 232, 56),
)
SUPPORT = "#d55e00"
"""The outline of support tokens."""

UNKNOWN = (191, 191, 191)
"""The colour of what has no value."""


def colours(values: Float[np.ndarray, " N"]) -> Int[np.ndarray, "N 3"]:
    """Return sRGB colours from 0 to 255, of the smallest finite values dark, of the largest light.

    The colours span the 1st to the 99th percentile of the finite values.

    Args:
        values: (N,); NaN is grey, and infinities have the colours of the ends.

    Returns:
        (N, 3).
    """
    finite = values[np.isfinite(values)].astype(np.float64)
    low, high = np.quantile(finite, [0.01, 0.99]) if finite.size else (0.0, 1.0)
    if not high - low > 1e-6 * max(1.0, abs(high)):
        low = high - 1.0  # none stands out: all have the colour of a large value
    anchors = np.array(ANCHORS, np.float64)
    place = np.clip((values.astype(np.float64) - low) / (high - low), 0, 1) * (len(anchors) - 1)
    known = np.where(np.isnan(place), 0, place)
    mixed = [np.interp(known, np.arange(len(anchors)), channel) for channel in anchors.T]
    found = np.stack(mixed, axis=-1)
    return np.where(np.isnan(place)[:, None], UNKNOWN, found).round().astype(np.int64)


def ink(colour: Int[np.ndarray, "3"]) -> str:
    """Return the colour of type on a background: black or white, whichever contrasts more."""
    channels = colour / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return "#000" if linear @ [0.2126, 0.7152, 0.0722] > 0.179 else "#fff"
