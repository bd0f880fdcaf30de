"""Figures of the paper drawn from computed data, and where the conditional density is proper."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

from probattn.inference.figures.style import (
    COLOURS,
    DOUBLE,
    SINGLE,
    SUPPORT_COLOUR,
    add_legend,
    label_axes,
    line_style,
    new_figure,
    styled,
)
from probattn.inference.paper.data import Cloud, MassMap, Trajectory

_BOUNDARY: dict[str, Any] = {"color": "0.3", "linewidth": 1.0, "linestyle": (0, (1.5, 1.5))}
_MINUS = "\N{MINUS SIGN}"
_X3, _DENSITY = (
    "x\N{SUBSCRIPT THREE} (units of \N{GREEK SMALL LETTER SIGMA})",
    "density given the past",
)
_SIGMA, _RHO = "\N{GREEK SMALL LETTER SIGMA}", "\N{GREEK SMALL LETTER RHO}"


@styled
def margin_geometry(trajectory: Trajectory) -> Figure:
    """Draw figure 1.1: tokens of a text, the boundary, and the support token's way to it.

    On logarithmic axes the boundary is a straight line, and the distance of a token from it grows
    with its determinant.
    """
    figure = new_figure(SINGLE, 3.1, layout="constrained")
    axes = figure.add_subplot()
    x, y = trajectory.query_spread, trajectory.key_spread
    (path,) = axes.plot(x, y, color="0.7", linewidth=0.7, zorder=1)
    (dots,) = axes.plot(x, y, "o", color=COLOURS[0], markersize=4, zorder=3)
    nearest = int(np.argmin(trajectory.determinant))
    for number, token in enumerate(trajectory.tokens):
        shown = "\N{OPEN BOX}" if token == " " else token
        aside = (-9, 0) if number == nearest else (3, 2)  # clear of the arrow
        axes.annotate(
            shown, (x[number], y[number]), xytext=aside, textcoords="offset points", fontsize=7
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    left, bottom = x.min() / 1.3, y.min() / 1.3
    extent = 1.6 * max(x.max() / left, y.max() / bottom)
    edge = np.geomspace(left, left * extent, 50)
    (boundary,) = axes.plot(edge, 1 / edge, **_BOUNDARY)
    shade = axes.fill_between(edge, 1 / edge, 1e6, color="0.9", linewidth=0)
    reach = 1 / np.sqrt(x[nearest] * y[nearest])  # to the boundary, along its normal
    axes.annotate(
        "",
        (x[nearest] * reach, y[nearest] * reach),
        (x[nearest], y[nearest]),
        arrowprops={"arrowstyle": "->", "color": SUPPORT_COLOUR, "shrinkA": 0, "shrinkB": 0},
    )
    (support,) = axes.plot(
        x[nearest], y[nearest], "D", color=SUPPORT_COLOUR, markersize=4.5, zorder=4
    )
    axes.set_xlim(left, left * extent)
    axes.set_ylim(bottom, bottom * extent)
    axes.set_aspect("equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_locator(NullLocator())
    label_axes(axes, None, "spread of the queries", "coupled spread of the keys")
    entries: dict[str, Artist] = {
        "token": dots,
        "order of the text": path,
        "support token, its margin": support,
        "boundary, det D = 0": boundary,
        "infeasible": shade,
    }
    add_legend(figure, entries)
    return figure


@styled
def conditional_densities(
    grid: np.ndarray,
    densities: Mapping[float, np.ndarray],
    factors: Mapping[float, np.ndarray],
    family: Mapping[float, np.ndarray],
) -> Figure:
    """Draw figure 3.2: density of x_3 given the past, its factor, and a family of couplings."""
    figure = new_figure(DOUBLE, 2.5, layout="constrained")
    panels = figure.subplots(1, 3)
    entries: dict[str, Artist] = {}
    order = sorted({*densities, *family})
    for axes, curves in zip(panels, (densities, factors, family), strict=True):
        for coupling, values in curves.items():
            style = line_style(order.index(coupling)) | {"marker": ""}
            (entries[_label(coupling)],) = axes.plot(grid, values, **style)
    panels[1].axhline(0, **_BOUNDARY)
    label_axes(panels[0], 0, _X3, _DENSITY)
    label_axes(panels[1], 1, _X3, f"factor 1 {_MINUS} a Var")
    label_axes(panels[2], 2, _X3, _DENSITY)
    add_legend(figure, {_label(coupling): entries[_label(coupling)] for coupling in order})
    return figure


@styled
def coupling_regimes(clouds: Sequence[Cloud]) -> Figure:
    """Draw figure 3.3: factor and log density of random sequences over their last variance."""
    figure = new_figure(DOUBLE, 4.2, layout="constrained")
    panels = figure.subplots(2, 2)
    entries: dict[str, Artist] = {}
    for row, cloud in enumerate(clouds):
        valid = np.isfinite(cloud.log_density)
        title = f"{_label(cloud.coupling)}: {cloud.valid} of {len(valid)} valid"
        left, right = panels[row]
        style = {"linestyle": "", "marker": ".", "markersize": 2, "rasterized": True}
        (entries["sequence"],) = left.plot(
            cloud.variance[valid], cloud.factor[valid], color=COLOURS[0], **style
        )
        right.plot(cloud.variance[valid], cloud.log_density[valid], color=COLOURS[0], **style)
        if not valid.all():
            (entries["excluded, density 0"],) = left.plot(
                cloud.variance[~valid], cloud.factor[~valid], color=SUPPORT_COLOUR, **style
            )
            floor = cloud.log_density[valid].min()
            right.plot(
                cloud.variance[~valid],
                np.full((~valid).sum(), floor - 0.05 * abs(floor)),
                color=SUPPORT_COLOUR,
                **style,
            )
        entries["boundary, factor 0"] = left.axhline(0, **_BOUNDARY)
        if cloud.coupling > 0:
            right.axvline(1 / cloud.coupling, **_BOUNDARY)
        label_axes(
            left, 2 * row, "Var at the last position", f"factor 1 {_MINUS} a Var", title=title
        )
        label_axes(right, 2 * row + 1, "Var at the last position", "log density (nats)")
    add_legend(figure, entries)
    return figure


@styled
def proper_region(maps: Sequence[MassMap]) -> Figure:
    """Draw the mass of a conditional over coupling and spread, and the certificate's boundary."""
    figure = new_figure(DOUBLE, 2.9, layout="constrained")
    panels = figure.subplots(1, len(maps), sharey=True)
    entries: dict[str, Artist] = {}
    norm = LogNorm(1e-6, 1.0)
    for number, (axes, one) in enumerate(zip(panels, maps, strict=True)):
        excess = np.clip(one.mass - 1, 1e-12, 1.0)
        image = axes.pcolormesh(
            one.coupling, one.spread, excess, norm=norm, cmap="Greys", shading="nearest"
        )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.contour(
            one.coupling,
            one.spread,
            one.certificate,
            levels=[1.0],
            colors=[COLOURS[0]],
            linewidths=1.4,
        )
        (entries[f"certificate {_RHO} = 1"],) = axes.plot([], [], color=COLOURS[0], linewidth=1.4)
        title = "unbounded context"
        if one.bound is not None:
            title = f"bounded context, c = {one.bound:g} {_SIGMA}"
            entries["c\N{SUPERSCRIPT TWO} a = 1"] = axes.axvline(
                1 / one.bound**2, color=COLOURS[1], linewidth=1.4, linestyle=(0, (5, 1.5))
            )
        label = f"distance of the two tokens ({_SIGMA})" if number == 0 else ""
        label_axes(axes, number, f"coupling a (1/{_SIGMA}\N{SUPERSCRIPT TWO})", label, title=title)
    bar = figure.colorbar(image, ax=panels, pad=0.02, extend="min")
    bar.set_label(f"mass of the conditional {_MINUS} 1")
    bar.ax.tick_params(labelsize=7)
    add_legend(figure, entries)
    return figure


def _label(coupling: float) -> str:
    return f"a = {coupling:+g}".replace("-", _MINUS) if coupling else "a = 0"
