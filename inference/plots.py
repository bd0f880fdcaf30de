"""Figures of runs: training, robustness to noise, and margins along a text, over it and in sum.

Matplotlib is imported here alone, and only its object-oriented interface: no figure needs a display,
registers with pyplot or depends on the user's matplotlibrc. Each is 3.4 or 7 inches wide, a journal's
single or double column, in 8-point type, and its curves can be told apart without colour.
"""

import os
import secrets
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, font_manager, style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from probattn.inference import figure_data as data
from probattn.inference.text_layout import RETURN_MARK, TextLayout, lay_out, legible

__all__ = [
    "margin_along_text",
    "margin_distribution",
    "noise_sweep",
    "save_figure",
    "text_by_margin",
    "training_curves",
]

_SINGLE, _DOUBLE = 3.4, 7.0  # widths of a figure, in inches
_DPI = 200
_SANS, _MONO = "DejaVu Sans", "DejaVu Sans Mono"  # both come with Matplotlib
_STYLE: dict[str, Any] = {
    "font.family": _SANS,
    "font.size": 8,
    "axes.linewidth": 0.6,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.titlesize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
_styled = style.context(["default", _STYLE])

# Okabe and Ito (2008), ordered so that neighbours differ in grey as well.
_COLOURS = ("#0072B2", "#E69F00", "#000000", "#CC79A7", "#D55E00", "#56B4E9", "#009E73")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (9, 1.5)))
_MARKERS = "os^Dv"
_TRAINING: dict[str, Any] = {"linestyle": (0, (4, 1.5)), "linewidth": 0.8}
_BOUNDARY: dict[str, Any] = {"color": "0.3", "linewidth": 0.9, "linestyle": (0, (1.5, 1.5))}
_SUPPORT = "#D55E00"

_BINS = 600  # points of a margin line; more would lie less than two pixels apart
_WINDOW_TICKS = 200  # window starts, beyond which they would be a band
_COLUMNS, _ROWS, _TYPE = 88, 100, 9.0  # of the picture of a text, and the size of its type


@_styled
def training_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Bits per character and smallest margin while fitting.

    Panel (a) has the training text dashed and the validation text solid. A further panel for each
    kind of margin that was monitored: margins of different kinds share no axis.

    Args:
        runs: label of a run -> the rows of its metrics.jsonl, with keys step, bpc, validation_bpc,
            min_margin and min_margin_kind. A value that is None was not measured and is left out.

    Raises:
        ValueError: if there is no run, or a run without rows, or a row without one of the keys.
    """
    data.check_any("runs", runs)
    measured = {
        (label, key): data.metric(label, rows, key)
        for label, rows in runs.items()
        for key in ("bpc", "validation_bpc", "min_margin", "min_margin_kind")
    }
    kinds = list(dict.fromkeys(chain.from_iterable(measured[k, "min_margin_kind"][1] for k in runs)))
    raise NotImplementedError(kinds)
