"""Draws of margins as what a page shows: medians, intervals, probabilities of support."""

import itertools
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from probattn.inference.export.diagnostics import values_of
from probattn.inference.pages.page import Page, Series, Summary

if TYPE_CHECKING:
    import xarray as xr

_LEVELS = (0.05, 0.5, 0.95)


def drawn_series(label: str, tree: "xr.DataTree") -> list[Series]:
    """Return what a page shows of a posterior: a series, or one for each head.

    The margin is the median over the draws in which it is known. The token that is most often the
    support token of its sequence is outlined.

    Args:
        label: label of the run.
        tree: from `to_datatree`; of a model without margins there is no series.
    """
    margin = values_of(tree, "posterior", "margin")
    support = values_of(tree, "support_tokens", "support_probability")
    certified = values_of(tree, "support_tokens", "certified_probability")
    if margin is None or support is None or certified is None:
        return []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        low, median, high = np.nanquantile(margin, _LEVELS, axis=(0, 1))
    outlined = np.zeros(support.shape, bool)
    np.put_along_axis(outlined, support.argmax(-1, keepdims=True), True, axis=-1)
    values = {
        "margin": median,
        "low": low,
        "high": high,
        "support_probability": support,
        "certified_probability": certified,
    }
    if support.ndim == 2:  # (sequence, position); otherwise with heads between them
        return [_series(label, "trained", values, outlined)]
    return [
        _series(
            label,
            f"layer 1 head {head + 1}",
            {name: value[:, head] for name, value in values.items()},
            outlined[:, head],
        )
        for head in range(support.shape[1])
    ]


def _series(
    label: str, stage: str, values: dict[str, Float[np.ndarray, "S T"]], outlined: np.ndarray
) -> Series:
    flat = {name: value.reshape(-1) for name, value in values.items()}
    return Series(label, stage, flat, outlined.reshape(-1))


def sequences_page(
    title: str,
    sequences: Sequence[Sequence[str]],
    series: Sequence[Series],
    *,
    notes: Sequence[str] = (),
    summary: Summary | None = None,
) -> Page:
    """Return a page of sequences that do not go on with each other.

    Args:
        title: what they are.
        sequences: what is shown of each token, all of one length.
        series: values of their tokens, one sequence after the other.
        notes: sentences under the title.
        summary: a table under them.
    """
    count, length = len(sequences), len(sequences[0])
    starts = list(range(0, count * length, length))
    return Page(
        title=title,
        tokens=list(itertools.chain.from_iterable(sequences)),
        index=np.arange(count * length),
        window=np.repeat(np.arange(count), length),
        position=np.tile(np.arange(length), count),
        starts=starts,
        breaks=starts[1:],
        series=series,
        notes=notes,
        summary=summary,
        outlined="support token of its sequence; of draws, the most probable one",
        sequences=True,
    )
