"""Dimensionality: profiles, bars, scatters and violins of dimensions; spectra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ..errors import UsageError
from .distributions import profile
from .samples import correlation
from .style import (
    INK,
    MARKERS,
    Depth,
    Result,
    bar_rows,
    check_dims,
    colour_bar,
    described,
    group_colours,
    grouping,
    heading,
    holding,
    layers_of,
    legend,
    loaded,
    named,
    new_axes,
    overlaid,
    panels,
    share_legend,
    stage_colour,
    stage_marker,
    stages_of,
    tidy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = [
    "dimension_bars",
    "dimension_profile",
    "dimension_scatter",
    "dimension_violins",
    "dimensions",
    "intrinsic_dimensions",
    "over_layers",
    "spectra",
    "spectrum",
]

_NULL = {"participation_ratio": "null_participation_ratio"}
_ERROR = {"dimension": "stderr"}

_FAR = 3
"""Normal data so many times above the rest make an axis logarithmic, and bars leave them out."""

_LEAST_VARIANCE = 1e-7
"""Fraction of the largest; components below are noise of the arithmetic."""


def dimension_profile(result: Result, variable: str, ax: Axes | None = None) -> Axes:
    """Draw a dimension over layers, a line for each stage, or for each group of one stage.

    Thin dashed lines are the participation ratio of normal data; error bars are standard errors.

    Parameters
    ----------
    result : Dataset
        From `actstore.dimensionality` or `actstore.intrinsic_dimension`.
    variable : str
        What to draw, as "participation_ratio".
    ax : Axes, optional
        Where to draw; default a new figure.

    Returns
    -------
    Axes

    Examples
    --------
    >>> import actstore, numpy as np, xarray as xr
    >>> from matplotlib.figure import Figure
    >>> acts = np.random.default_rng(0).normal(size=(3, 20, 4)).astype("float32")
    >>> data = xr.DataArray(acts, dims=("layer", "token", "neuron"), name="mlp_out")
    >>> result = actstore.dimensionality(data)
    >>> ax = dimension_profile(result, "participation_ratio", Figure().subplots())
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('layer', 'participation ratio')
    """
    result = loaded(result)
    ax = profile(result, variable, ax)
    null, error = _NULL.get(variable, ""), _ERROR.get(variable, "")
    parts = [part for *_, part in _marks(result)]
    for line, part in zip(ax.lines[-len(parts) :], parts, strict=True):
        x, y, colour = line.get_xdata(), line.get_ydata(), line.get_color()
        if null in part:
            ax.plot(x, part[null].values.ravel(), "--", color=colour, linewidth=0.8)
        if error in part:
            style: Any = {"ecolor": colour, "elinewidth": 0.9, "capsize": 2}
            ax.errorbar(x, y, part[error].values.ravel(), fmt="none", **style)
    top = ax.dataLim.y1
    if null in parts[0]:
        ax.plot([], [], "--", color=INK, linewidth=0.8, label="normal data")
        legend(ax)
        top = max(np.nanmax(part[variable].values, initial=0) for part in parts)
    if 0 < _FAR * top < ax.dataLim.y1:
        _tick_decades(ax)
    elif ax.dataLim.y0 >= 0:
        ax.set_ylim(bottom=0)
    return ax


def _tick_decades(ax: Axes) -> None:
    """A logarithmic vertical axis, with plain numbers."""
    from matplotlib.ticker import LogLocator

    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:,g}")
    ax.yaxis.set_minor_formatter("")


def _marks(result: Result) -> list[tuple[str, str, Any, xr.Dataset]]:
    """Label, marker, colour and data of each stage, or of each group of one; as in profiles."""
    parts = stages_of(result)
    group = str(result.attrs.get("by"))
    part, *more = parts.values()
    if not more and part.sizes.get(group, 1) > 1:
        keys = part[group].values
        looks = zip(keys, MARKERS * len(keys), group_colours(len(keys)), strict=False)
        return [(f"{group} {named(k)}", m, c, part.sel({group: k})) for k, m, c in looks]
    return [(s, stage_marker(s), stage_colour(s) if s else INK, p) for s, p in parts.items()]


def dimension_bars(result: xr.Dataset, variable: str, ax: Axes | None = None) -> Axes:
    """Draw a dimension at one layer, a bar for each stage, or for each group of each stage.

    Dashed lines are the participation ratio of normal data; error bars are standard errors.

    Parameters
    ----------
    result : Dataset
        From `actstore.dimensionality` or `actstore.intrinsic_dimension`, of one layer.
    variable : str
        What to draw, as "participation_ratio".
    ax : Axes, optional
        Where to draw; default a new figure.

    Returns
    -------
    Axes

    Examples
    --------
    >>> import actstore, numpy as np, xarray as xr
    >>> from matplotlib.figure import Figure
    >>> acts = np.random.default_rng(0).normal(size=(3, 20, 4)).astype("float32")
    >>> data = xr.DataArray(acts, dims=("layer", "token", "neuron"), name="mlp_out")
    >>> result = actstore.dimensionality(data, layers=1)
    >>> ax = dimension_bars(result, "participation_ratio", Figure().subplots())
    >>> ax.get_xlabel().splitlines()
    ['participation ratio', 'dashed: normal data']
    """
    result = holding(result, str(result.attrs.get("query", "dimensionality")), variable)
    group = str(result.attrs.get("by"))
    check_dims(result[variable], "stage", *grouping(result))
    ax = new_axes(ax)
    parts = stages_of(result)
    keys = np.atleast_1d(result[group].values) if group in result.coords else np.zeros(1)

    def table(name: str) -> np.ndarray:
        return np.stack([p[name].values.ravel() for p in parts.values()], axis=1)

    many = len(keys) > 1
    colours = group_colours(len(keys)) if many else [stage_colour(s) if s else INK for s in parts]
    labels = [named(k) for k in keys] if many else [""]
    error, null = _ERROR.get(variable, ""), _NULL.get(variable, "")
    reach = np.stack([table(error)] * 2) if error in result else None
    at = bar_rows(ax, [named(s) for s in parts], table(variable), colours, labels, reach)
    words = described(result[variable])
    if null in result:
        half, normal, top = 0.38 / len(keys), table(null), np.nanmax(table(variable), initial=0)
        near = normal <= _FAR * top
        style: Any = {"colors": INK, "linestyles": "--", "linewidth": 1}
        ax.vlines(normal[near], (at - half)[near], (at + half)[near], **style)
        words += "\ndashed: normal data" if near.any() else ""
        if not near.all():
            words += f"\nnormal data: up to {normal.max():,.0f}"
    if many:
        legend(ax, group)
    title = ", ".join(filter(None, (heading(result, ["stage"]), variable.replace("_", " "))))
    return tidy(ax, title, words)


def over_layers(result: Result, variable: str, ax: Axes | None = None) -> Axes:
    """Draw a dimension as a profile over layers, or as bars where there is but one.

    Parameters
    ----------
    result : Dataset
        From `actstore.dimensionality` or `actstore.intrinsic_dimension`.
    variable : str
        What to draw, as "participation_ratio".
    ax : Axes, optional
        Where to draw; default a new figure.

    Returns
    -------
    Axes
    """
    draw: Callable[..., Axes] = dimension_profile if _n_layers(result) > 1 else dimension_bars
    return draw(result, variable, ax)


def dimension_scatter(
    result: xr.Dataset, ax: Axes | None = None, *, depth: Depth | None = None
) -> Axes:
    """Draw the effective dimension against the participation ratio, layers by colour.

    Markers are stages, or groups of one stage.

    Parameters
    ----------
    result : Dataset
        From `actstore.dimensionality`.
    ax : Axes, optional
        Where to draw; default a new figure.
    depth : Depth, optional
        Colours of layers, where several panels share a colour bar; default the result's own layers,
        with a bar.

    Returns
    -------
    Axes

    Examples
    --------
    >>> import actstore, numpy as np, xarray as xr
    >>> from matplotlib.figure import Figure
    >>> acts = np.random.default_rng(0).normal(size=(3, 20, 4)).astype("float32")
    >>> data = xr.DataArray(acts, dims=("layer", "token", "neuron"), name="mlp_out")
    >>> ax = dimension_scatter(actstore.dimensionality(data), Figure().subplots())
    >>> ax.get_ylabel().split()
    ['components', 'for', '0.95', 'of', 'the', 'variance']
    """
    result = holding(result, "dimensionality", "participation_ratio")
    parts = stages_of(result)
    allowed = ["layer", *(["stage"] if len(parts) > 1 else grouping(result))]
    names = ("participation_ratio", "effective_dimension")
    check_dims(result[names[0]], *allowed)
    ax = new_axes(ax)
    bar = depth is None
    depth = Depth(*layers_of(parts)) if depth is None else depth
    deep = len(depth.layers) > 1
    points = []
    for label, marker, colour, part in _marks(result):
        x, y = (part[name].values.ravel() for name in names)
        own: Any = [depth[n] for n in np.atleast_1d(part["layer"].values)] if deep else colour
        ax.scatter(x, y, 40, c=own, marker=marker, linewidths=0.4, edgecolors="white", alpha=0.9)
        ax.plot([], [], marker, color=INK if deep else colour, markersize=5, label=label)
        points.append(np.stack([x, y]))
    if len(points) > 1:
        legend(ax)
    if bar and deep:
        colour_bar(depth, [ax])
    x, y = np.concatenate(points, axis=1)
    there = np.isfinite(x) & np.isfinite(y)
    title = [heading(result, but=["layer"] if deep else [])]
    if there.sum() > 2:
        title.append(f"r = {correlation(x[there], y[there]):.2f}")
    return tidy(ax, ", ".join(filter(None, title)), *(described(result[name]) for name in names))


def dimensions(result: Result, figure: Figure | SubFigure | None = None) -> np.ndarray:
    """Draw participation ratio and effective dimension over layers, and against one another.

    Of one layer as bars. Several groups of several stages have a column for each stage.

    Parameters
    ----------
    result : Dataset
        From `actstore.dimensionality`.
    figure : Figure or SubFigure, optional
        Where to draw; default a new figure.

    Returns
    -------
    ndarray of Axes

    Examples
    --------
    >>> import actstore, numpy as np, xarray as xr
    >>> from matplotlib.figure import Figure
    >>> acts = np.random.default_rng(0).normal(size=(3, 20, 4)).astype("float32")
    >>> data = xr.DataArray(acts, dims=("layer", "token", "neuron"), name="mlp_out")
    >>> axes = dimensions(actstore.dimensionality(data), Figure())
    >>> [ax.get_xlabel() for ax in axes.flat]
    ['layer', 'layer', 'participation ratio']
    """
    result = loaded(result)
    names = ("participation_ratio", "effective_dimension")
    draws: list[Callable[..., Any]] = [partial(over_layers, variable=name) for name in names]
    shared = Depth(*layers_of(stages_of(result))) if len(columns_of(result)) > 1 else None
    if _n_layers(result) > 1 or (len(stages_of(result)) > 1 and not _grouped(result)):
        draws.append(partial(dimension_scatter, depth=shared))
    axes = panels_over_layers(draws, result, figure)
    if shared:
        colour_bar(shared, list(axes[-1]))
    return axes


def intrinsic_dimensions(result: Result, figure: Figure | SubFigure | None = None) -> np.ndarray:
    """Draw the intrinsic dimension over layers, or at one as bars, with standard errors.

    Several groups of several stages have a column for each stage.

    Parameters
    ----------
    result : Dataset
        From `actstore.intrinsic_dimension`.
    figure : Figure or SubFigure, optional
        Where to draw; default a new figure.

    Returns
    -------
    ndarray of Axes

    Examples
    --------
    >>> import actstore, numpy as np, xarray as xr
    >>> from matplotlib.figure import Figure
    >>> acts = np.random.default_rng(0).normal(size=(3, 20, 4)).astype("float32")
    >>> data = xr.DataArray(acts, dims=("layer", "token", "neuron"), name="mlp_out")
    >>> axes = intrinsic_dimensions(actstore.intrinsic_dimension(data), Figure())
    >>> axes.shape, axes[0, 0].get_xlabel()
    ((1, 1), 'layer')
    """
    draws = [partial(over_layers, variable="dimension")]
    return panels_over_layers(draws, loaded(result), figure)


def panels_over_layers(
    draws: Sequence[Callable[..., Any]], result: Result, figure: Figure | SubFigure | None
) -> np.ndarray:
    """Draw several pictures of a result in a row; in a column for each stage, if groups are lines.

    Parameters
    ----------
    draws : sequence of callable
        Draw a part of the result, in Axes ``ax``.
    result : Dataset or DataTree
    figure : Figure or SubFigure or None

    Returns
    -------
    ndarray of Axes
    """
    columns, deep = columns_of(result), _n_layers(result) > 1
    n = len(columns)
    height = 2.7 if deep else max(1.8, 1.1 + 0.25 * len(stages_of(result)))
    size = (3.4, height) if len(draws) * n > 1 else (5, 1.2 * height)
    axes = panels(figure, *((len(draws), n) if n > 1 else (1, len(draws))), size)
    for row, draw in zip(axes if n > 1 else axes.T, draws, strict=True):
        for ax, part in zip(row, columns, strict=True):
            draw(part, ax=ax)
    if axes.size > 1 and (deep or _grouped(result)):
        share_legend(axes)
    return axes


def columns_of(result: Result) -> list[Any]:
    """The result; or its stages, where lines of profiles are groups."""
    parts = stages_of(result)
    if len(parts) > 1 and _n_layers(result) > 1 and _grouped(result):
        return list(parts.values())
    return [result]


def _n_layers(result: Result) -> int:
    return max(part.sizes.get("layer", 1) for part in stages_of(result).values())


def _grouped(result: Result) -> bool:
    group = str(result.attrs.get("by"))
    return any(part.sizes.get(group, 1) > 1 for part in stages_of(result).values())


def dimension_violins(result: xr.Dataset, figure: Figure | SubFigure | None = None) -> np.ndarray:
    """Draw how participation ratio and effective dimension spread over layers, stage by stage.

    Dots are layers, from dark to light with depth; a bar is the median. Groups have a row each.

    Parameters
    ----------
    result : Dataset
        From `actstore.dimensionality`, of two layers or more.
    figure : Figure or SubFigure, optional
        Where to draw; default a new figure.

    Returns
    -------
    ndarray of Axes (group, variable)

    Examples
    --------
    >>> import actstore, numpy as np, xarray as xr
    >>> from matplotlib.figure import Figure
    >>> acts = np.random.default_rng(0).normal(size=(3, 20, 4)).astype("float32")
    >>> data = xr.DataArray(acts, dims=("layer", "token", "neuron"), name="mlp_out")
    >>> axes = dimension_violins(actstore.dimensionality(data), Figure())
    >>> axes.shape, axes[0, 1].get_title(loc="left").splitlines()[-1]
    ((1, 2), 'effective dimension')
    """
    result = holding(result, "dimensionality", "participation_ratio")
    parts = stages_of(result)
    if _n_layers(result) < 2:
        raise UsageError(
            "violins are over layers, and the result has one: ask for more layers, or draw bars "
            "with actstore.plot.dimension_bars"
        )
    group = str(result.attrs.get("by"))
    keys = result[group].values if _grouped(result) else [None]
    depth = Depth(*layers_of(parts))
    axes = panels(figure, len(keys), 2, (max(3.0, 0.7 + 0.7 * len(parts)), 2.7))
    for row, key in zip(axes, keys, strict=True):
        own = result if key is None else result.sel({group: [key]})
        for ax, variable in zip(row, ("participation_ratio", "effective_dimension"), strict=True):
            _violins(own, variable, ax, depth)
    colour_bar(depth, list(axes.flat))
    return axes


def _violins(result: xr.Dataset, variable: str, ax: Axes, depth: Depth) -> None:
    parts = stages_of(result)
    for i, (stage, part) in enumerate(parts.items()):
        values, layers = part[variable].values.ravel(), part["layer"].values
        there = np.isfinite(values)
        values, layers = values[there], layers[there]
        if not len(values):
            continue
        drawn = ax.violinplot(values, [i], widths=0.8, showextrema=False)
        for body in drawn["bodies"]:  # type: ignore[attr-defined]
            body.set(facecolor=stage_colour(stage) if stage else INK, alpha=0.35, linewidth=0)
        ax.hlines(np.median(values), i - 0.2, i + 0.2, colors=INK, linewidth=1.5)
        colours = [depth[n] for n in layers]
        ax.scatter(np.full(len(values), i), values, 14, c=colours, zorder=3, linewidths=0)
    ax.set_xticks(range(len(parts)), [named(s) for s in parts])
    ax.set_xlim(-0.6, len(parts) - 0.4)
    ax.set_ylim(bottom=0)
    title = "\n".join(filter(None, (heading(result), variable.replace("_", " "))))
    tidy(ax, title, y=described(result[variable]))


_SPECTRUM = ("variance", "cumulative")


def spectrum(
    result: xr.Dataset, variable: str, ax: Axes | None = None, *, depth: Depth | None = None
) -> Axes:
    """Draw the variance of principal components, or its fraction so far; a line for each layer.

    Components run logarithmically, variances too, down to 1e-7 of the largest.

    Parameters
    ----------
    result : Dataset
        From `actstore.spectrum`; one dimension besides ``component`` may be longer than 1.
    variable : {"variance", "explained", "cumulative"}
        What to draw.
    ax : Axes, optional
        Where to draw; default a new figure.
    depth : Depth, optional
        Colours of layers, where several panels share a colour bar; default the result's own layers,
        with a bar.

    Returns
    -------
    Axes

    Examples
    --------
    >>> import actstore, numpy as np, xarray as xr
    >>> from matplotlib.figure import Figure
    >>> acts = np.random.default_rng(0).normal(size=(3, 20, 4)).astype("float32")
    >>> data = xr.DataArray(acts, dims=("layer", "token", "neuron"), name="mlp_out")
    >>> ax = spectrum(actstore.spectrum(data), "variance", Figure().subplots())
    >>> len(ax.lines), ax.get_xlabel()
    (3, 'component')
    """
    result = holding(result, "spectrum", variable)
    allowed = ("stage", "layer", *grouping(result))
    along = next(iter(check_dims(result[variable].isel(component=0), *allowed, most=1)), "")
    ax = new_axes(ax)
    component = result["component"].values
    marker = "o" if len(component) <= 30 else ""

    def line(part: xr.Dataset, colour: Any, label: str) -> None:
        values = part[variable].values.ravel()
        style = {"color": colour, "linewidth": 1.2, "marker": marker, "markersize": 2.5}
        ax.plot(component, values, label=label, **style)

    overlaid(line, result, along, ax, depth)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.xaxis.set_minor_formatter("")
    values = result[variable].values
    if variable == "cumulative":
        ax.set_ylim(0, 1.03)
    elif (values > 0).any():
        ax.set_yscale("log")
        top = np.nanmax(values)
        low = np.nanmin(values[values > _LEAST_VARIANCE * top])
        ax.set_ylim(low / 1.5, top * 1.5)
    return tidy(ax, heading(result), "component", described(result[variable]))


def spectra(result: Result, figure: Figure | SubFigure | None = None) -> np.ndarray:
    """Draw variances of components and their running sum, stages side by side, groups below.

    The lines of a panel are layers where there are several; else groups; else stages.

    Parameters
    ----------
    result : Dataset
        From `actstore.spectrum`.
    figure : Figure or SubFigure, optional
        Where to draw; default a new figure.

    Returns
    -------
    ndarray of Axes

    Examples
    --------
    >>> import actstore, numpy as np, xarray as xr
    >>> from matplotlib.figure import Figure
    >>> acts = np.random.default_rng(0).normal(size=(3, 20, 4)).astype("float32")
    >>> data = xr.DataArray(acts, dims=("layer", "token", "neuron"), name="mlp_out")
    >>> axes = spectra(actstore.spectrum(data), Figure())
    >>> axes.shape
    (1, 2)
    """
    result = loaded(result)
    parts, deep = stages_of(result), _n_layers(result) > 1
    depth = Depth(*layers_of(parts)) if deep else None
    columns: list[Any] = [result]
    if len(parts) > 1 and (deep or _grouped(result)):
        columns = list(parts.values())
    group = str(result.attrs.get("by"))
    keys: Any = result[group].values if deep and _grouped(result) else [None]
    rows = list(product(keys, _SPECTRUM))
    shape = (len(rows), len(columns)) if len(columns) > 1 else (len(keys), len(_SPECTRUM))
    axes = panels(figure, *shape, (3.3, 2.5))
    grid = axes if len(columns) > 1 else axes.reshape(-1, 1)
    for row, (key, variable) in zip(grid, rows, strict=True):
        for ax, part in zip(row, columns, strict=True):
            own = part if key is None else part.sel({group: [key]})
            spectrum(own, variable, ax, depth=depth)
    if depth:
        colour_bar(depth, list(axes.flat))
    else:
        share_legend(axes)
    return axes
