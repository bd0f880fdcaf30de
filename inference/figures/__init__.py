"""Figures of runs and posteriors: functions that return a Matplotlib figure and write nothing.

`save_figure` writes one. Matplotlib is imported when the first of these names is asked for, so that
a command without figures starts without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probattn.inference.figures.margins import margin_along_text, margin_distribution
    from probattn.inference.figures.noise import loss_by_margin, noise_kinds, noise_sweep
    from probattn.inference.figures.posterior import (
        barrier_weights,
        reliability_diagram,
        smallest_margin,
        support_map,
    )
    from probattn.inference.figures.style import save_figure
    from probattn.inference.figures.text import text_by_margin
    from probattn.inference.figures.training import barrier_curves, training_curves

_FILES = {
    "barrier_curves": "training",
    "barrier_weights": "posterior",
    "loss_by_margin": "noise",
    "margin_along_text": "margins",
    "margin_distribution": "margins",
    "noise_kinds": "noise",
    "noise_sweep": "noise",
    "reliability_diagram": "posterior",
    "save_figure": "style",
    "smallest_margin": "posterior",
    "support_map": "posterior",
    "text_by_margin": "text",
    "training_curves": "training",
}

__all__ = [
    "barrier_curves",
    "barrier_weights",
    "loss_by_margin",
    "margin_along_text",
    "margin_distribution",
    "noise_kinds",
    "noise_sweep",
    "reliability_diagram",
    "save_figure",
    "smallest_margin",
    "support_map",
    "text_by_margin",
    "training_curves",
]


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
