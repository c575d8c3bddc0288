"""Distributions: histograms, quantiles, peaks, and any statistic over layers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ..errors import UsageError
from .style import (
    INK,
    MARKERS,
    POINTS,
    Depth,
    Result,
    check_dims,
    colour_bar,
    cut,
    described,
    facets,
    group_colours,
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
    tick_layers,
    tick_whole,
    tidy,
    varying,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = [
    "histogram",
    "histograms",
    "neuron_panels",
    "neuron_peaks",
    "peak_positions",
    "profile",
    "profiles",
    "quantile_panels",
    "quantiles",
]

_TRANSFORMS = {
    None: "activation",
    "center": "activation − neuron mean",
    "scale": "activation − neuron mean, scaled",
    "peak": "activation − neuron peak, scaled",
}


def histogram(
    result: xr.Dataset,
    ax: Axes | None = None,
    *,
    log: bool | None = None,
    depth: Depth | None = None,
) -> Axes:
    """Draw histograms in one Axes: a line for each stage, layer, group or head, or all neurons.

    Parameters
    ----------
    result : Dataset
        From `actstore.histogram`; one dimension besides ``bin`` may be longer than 1.
    ax : Axes, optional
        Where to draw; default a new figure.
    log : bool, optional
        Logarithmic counts; default for neurons only.
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
    >>> result = actstore.histogram(data, bins=10, range=(-3, 3))
    >>> ax = histogram(result.sel(layer=1), Figure().subplots())
    >>> ax.get_xlabel(), ax.get_title(loc="left")
    ('activation', 'mlp_out, layer 1')
    """
    result, name = _held(result)
    group = result.attrs.get("by")
    allowed = ["stage", "layer", *([group] if group else []), "head", "neuron"]
    along = next(iter(check_dims(result[name].isel(bin=0), *allowed, most=1)), "")
    ax = new_axes(ax)
    parts = [result.isel({along: [i]}) for i in range(result.sizes[along])] if along else [result]
    lines = [_line(part, name) for part in parts]
    if along == "neuron":
        own = next(iter(stages_of(result)))
        _overlay(ax, lines, stage_colour(own) if own else INK)
    else:
        overlaid(partial(_stairs, ax, name), result, along, ax, depth)
    log = along == "neuron" if log is None else log
    log = log and any((values > 0).any() for _, values in lines)
    ax.set_yscale("log" if log else "linear")
    if name == "counts" and not log:
        ax.yaxis.set_major_formatter("{x:,.0f}")
    cut_off = "" if log else cut(ax, [values.max(initial=0) for _, values in lines])
    if not (log or _asked(result, "range") or isinstance(_asked(result, "bins"), list)):
        _zoom(ax, lines)
    return tidy(ax, heading(result), _values(result), described(result[name]) + cut_off)


def _held(result: xr.Dataset) -> tuple[xr.Dataset, str]:
    """A histogram with its values, and the variable that holds it."""
    result = holding(result, "histogram", "counts", "density")
    return result, "density" if "density" in result else "counts"


def _line(part: xr.Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Edges and values of one histogram, without padding; none where there is nothing."""
    edges = part["edges"].values.ravel()
    values = part[name].values.ravel()
    bins = max(0, np.isfinite(edges).sum() - 1)
    values = values[:bins]
    return (edges[: bins + 1], values) if np.isfinite(values).all() else (edges[:0], values[:0])


def _stairs(ax: Axes, name: str, part: xr.Dataset, colour: Any, label: str) -> None:
    edges, values = _line(part, name)
    if len(values):
        ax.stairs(values, edges, color=colour, label=label, linewidth=1.3)


def _overlay(ax: Axes, lines: Sequence[tuple[np.ndarray, np.ndarray]], colour: str) -> None:
    """Many thin lines through the middles of the bins, as one artist."""
    from matplotlib.collections import LineCollection

    lines = [(edges, values) for edges, values in lines if len(values)]
    middles = [np.column_stack([(e[1:] + e[:-1]) / 2, v]) for e, v in lines]
    alpha = float(np.clip(20 / max(len(lines), 1), 0.12, 0.8))
    ax.add_collection(
        LineCollection(middles, colors=colour, alpha=alpha, linewidths=0.7, rasterized=True)
    )
    ax.autoscale_view()
    positive = np.concatenate([v[v > 0] for _, v in lines] or [np.ones(1)])
    if len(positive):
        ax.set_ylim(0.7 * positive.min(), 1.5 * positive.max())


def _zoom(ax: Axes, lines: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Leave out tails lower than can be seen: the data's own range may be very wide."""
    least = ax.get_ylim()[1] / 500
    seen = [(edges[:-1][values > least], edges[1:][values > least]) for edges, values in lines]
    seen = [(low, high) for low, high in seen if len(low)]
    if seen:
        left, right = min(low[0] for low, _ in seen), max(high[-1] for _, high in seen)
        ax.set_xlim(left - 0.05 * (right - left), right + 0.05 * (right - left))


def _asked(result: xr.Dataset, parameter: str) -> Any:
    return json.loads(result.attrs.get("parameters", "{}")).get(parameter)


def _values(result: xr.Dataset) -> str:
    """The horizontal label; says how many values the bins leave out."""
    transform = _asked(result, "transform")
    outside = sum(int(result[n].sum()) for n in ("below", "above") if n in result)
    between = "\n" if transform else "; "
    return _TRANSFORMS[transform] + (f"{between}{outside:,} outside" if outside else "")


def histograms(
    result: Result, figure: Figure | SubFigure | None = None, *, log: bool | None = None
) -> np.ndarray:
    """Draw histograms of any shape in panels.

    The lines of a panel are neurons, heads or layers where there are several; else groups; else
    stages. Everything else has a panel of its own. Layers of one stage are drawn twice, with
    linear and with logarithmic counts.

    Parameters
    ----------
    result : Dataset or DataTree
        From `actstore.histogram`.
    figure : Figure or SubFigure, optional
        Where to draw; default a new figure.
    log : bool, optional
        Logarithmic counts; default both for layers of one stage, yes for neurons, else no.

    Returns
    -------
    ndarray of Axes

    Examples
    --------
    >>> import actstore, numpy as np, xarray as xr
    >>> from matplotlib.figure import Figure
    >>> acts = np.random.default_rng(0).normal(size=(3, 20, 4)).astype("float32")
    >>> data = xr.DataArray(acts, dims=("layer", "token", "neuron"), name="mlp_out")
    >>> axes = histograms(actstore.histogram(data, bins=10, range=(-3, 3)), Figure())
    >>> [ax.get_yscale() for ax in axes.flat]
    ['linear', 'log']
    """
    result = loaded(result)
    parts = stages_of(result)
    long = {d for part in parts.values() for d in varying(part[_held(part)[1]]) if d != "bin"}
    group = result.attrs.get("by")
    along = next((d for d in ("neuron", "head", "layer", group) if d in long), "")
    if not along and isinstance(result, xr.Dataset):
        axes = panels(figure, 1, 1, (5, 3.4))
        histogram(result, axes[0, 0], log=log)
        return axes
    depth = Depth(*layers_of(parts)) if along == "layer" else None
    if depth and len(parts) == 1 and group not in long and log is None:
        (only,) = parts.values()
        axes = panels(figure, 1, 2, (4.2, 3.2))
        for ax, scale in zip(axes.flat, ("linear", "log"), strict=True):
            histogram(only, ax, log=scale == "log", depth=depth)
            tidy(ax, ", ".join(filter(None, (heading(only), f"{scale} scale"))))
    else:
        axes = facets(partial(histogram, log=log, depth=depth), result, figure, (3.6, 2.6), [along])
    if depth:
        colour_bar(depth, list(axes.flat))
    return axes


def neuron_panels(
    result: xr.Dataset,
    flags: xr.Dataset,
    figure: Figure | SubFigure | None = None,
    *,
    peak: xr.Dataset | None = None,
    mean: xr.Dataset | None = None,
) -> np.ndarray:
    """Draw the neurons that are mostly about zero, the others, and all of them centred.

    Parameters
    ----------
    result : Dataset
        From `actstore.histogram` with ``per="neuron"``, of one stage and layer.
    flags : Dataset
        From `actstore.zeroness` or `actstore.peaks`, of the same neurons.
    figure : Figure or SubFigure, optional
        Where to draw; default a new figure.
    peak, mean : Dataset, optional
        As `result`, with ``transform="peak"`` and with ``transform="scale"``.

    Returns
    -------
    ndarray of Axes

    Examples
    --------
    >>> import actstore, numpy as np, xarray as xr
    >>> from matplotlib.figure import Figure
    >>> acts = np.random.default_rng(0).normal(size=(3, 20, 4)).astype("float32")
    >>> data = xr.DataArray(acts, dims=("layer", "token", "neuron"), name="mlp_out")
    >>> one = actstore.histogram(data, layers=1, per="neuron", bins=10, range=(-3, 3))
    >>> axes = neuron_panels(one, actstore.zeroness(data, layers=1), Figure())
    >>> [ax.get_title(loc="left").splitlines()[0] for ax in axes.flat]
    ['zeroed: 3 neurons', 'not zeroed: 1 neuron']
    """
    flags = holding(flags, "zeroness", "zeroed", "centred_on_zero")
    flag = flags["zeroed" if "zeroed" in flags else "centred_on_zero"]
    check_dims(flag, "neuron")
    zero = flag.values.ravel().astype(bool)
    if zero.size != result.sizes.get("neuron"):
        raise UsageError(
            f"{flag.name} is about {zero.size:,} neurons and the histograms about "
            f"{result.sizes.get('neuron', 0):,}: ask for both with the same neurons="
        )
    words = ("zeroed", "not zeroed") if flag.name == "zeroed" else ("peak near 0", "peak elsewhere")
    parts = {}
    for word, chosen in zip(words, (zero, ~zero), strict=True):
        n = int(chosen.sum())
        parts[f"{word}: {n:,} neuron{'' if n == 1 else 's'}"] = result.isel(neuron=chosen)
    parts |= {"peak-centred": peak} if peak is not None else {}
    parts |= {"mean-centred": mean} if mean is not None else {}
    axes = panels(figure, 1, len(parts), (3.0, 2.8), sharey=True)
    limits = []
    for ax, (title, part) in zip(axes.flat, parts.items(), strict=True):
        if part.sizes["neuron"]:
            histogram(part, ax, log=True)
            limits.append(ax.get_ylim())
        else:
            ax.set_xticks([])
        tidy(ax, title)
        ax.label_outer()
    axes[0, 0].set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    return axes


def neuron_peaks(result: xr.Dataset, peaks: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Draw neurons' histograms with their peaks marked, the chosen one filled.

    A bar at half the chosen peak's height spans the run of bins above it.

    Parameters
    ----------
    result : Dataset
        From `actstore.histogram` with ``per="neuron"``, of one stage and layer; at most 8 neurons.
    peaks : Dataset
        From `actstore.peaks`, of the same stage and layer, with those neurons or more.
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
    >>> one = actstore.histogram(data, layers=1, per="neuron", bins=10, range=(-3, 3))
    >>> found = actstore.peaks(data, layers=1, height=2)
    >>> ax = neuron_peaks(one, found, Figure().subplots())
    >>> ax.get_xlabel()
    'activation'
    """
    result, name = _held(result)
    peaks = holding(peaks, "peaks", "peak_position")
    check_dims(result[name].isel(bin=0), "neuron")
    check_dims(peaks["position"], "neuron")
    neurons = np.atleast_1d(result["neuron"].values)
    if len(neurons) > 8:
        raise UsageError(
            f"{len(neurons):,} neurons cannot be told apart: select at most 8, as "
            "result.sel(neuron=[3, 17])"
        )
    result, peaks = (d if "neuron" in d.dims else d.expand_dims("neuron") for d in (result, peaks))
    ax = new_axes(ax)
    for neuron, colour in zip(neurons, group_colours(len(neurons)), strict=True):
        edges, values = _line(result.sel(neuron=neuron), name)
        own = peaks.sel(neuron=neuron)
        ax.stairs(values, edges, color=colour, linewidth=1.2, label=f"neuron {neuron}")
        for variable, face in (("peak_position", "white"), ("position", colour)):
            x = own[variable].values.ravel()
            x = x[np.isfinite(x)]
            y = values[np.searchsorted(edges, x, "right").clip(1, len(values)) - 1]
            ax.plot(x, y, "o", color=colour, markerfacecolor=face, markersize=6)
        if len(x):
            ax.hlines(y / 2, own["run_low"].values, own["run_high"].values, colors=colour)
    ax.set_yscale("log")
    legend(ax)
    return tidy(ax, heading(result, but=["neuron"]), _values(result), described(result[name]))


def peak_positions(result: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Draw where the chosen peak of every neuron is; the neurons of a layer run left to right.

    Parameters
    ----------
    result : Dataset
        From `actstore.peaks`, of one stage.
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
    >>> ax = peak_positions(actstore.peaks(data, height=2), Figure().subplots())
    >>> ax.get_xlabel()
    'layer'
    """
    result = holding(result, "peaks", "position")
    check_dims(result["position"], "layer", "neuron")
    ax = new_axes(ax)
    layers, names = layers_of(stages_of(result))
    if len(layers) > 1:
        n = result.sizes["neuron"]
        x = np.add.outer(layers, (np.arange(n) + 0.5) / n * 0.8 - 0.4)
        tick_layers(ax, layers, names)
    else:
        x = np.atleast_2d(result["neuron"].values)
        tick_whole(ax)
    y = result["position"].values.reshape(x.shape)
    found, zero = np.isfinite(y), result["centred_on_zero"].values.reshape(x.shape).astype(bool)
    sides = (found & zero, INK, "near 0"), (found & ~zero, "#d55e00", "elsewhere")
    for chosen, colour, words in sides:
        label = f"{words}: {chosen.sum():,}"
        ax.scatter(x[chosen], y[chosen], 5, color=colour, label=label, alpha=0.6, **POINTS)
    if not found.all():
        ax.plot([], [], " ", label=f"none: {(~found).sum():,}")
    legend(ax, above=True, markerscale=2)
    several = len(layers) > 1
    title = heading(result, but=["layer"] if several else [])
    return tidy(ax, title, "layer" if several else "neuron", described(result["position"]))


def quantiles(result: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Draw quantiles over layers: bands between each fraction and its opposite.

    Parameters
    ----------
    result : Dataset
        From `actstore.quantiles`, of one stage.
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
    >>> result = actstore.quantiles(data, q=[0.05, 0.5, 0.95])
    >>> ax = quantiles(result, Figure().subplots())
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['0.05 to 0.95', '0.5']
    """
    result = holding(result, "quantiles", "quantile")
    check_dims(result["quantile"], "layer", "q")
    ax = new_axes(ax)
    (stage,) = parts = stages_of(result)
    layers, names = layers_of(parts)
    drawn = result.sortby("q")
    fractions = drawn["q"].values
    values = drawn["quantile"].transpose(..., "q").values.reshape(len(layers), -1)
    colour = stage_colour(stage) if stage else INK
    pairs = len(fractions) // 2
    for i in range(pairs):
        low, high = values[:, i], values[:, -1 - i]
        label = f"{fractions[i]:g} to {fractions[-1 - i]:g}"
        # A single layer has no width: a band of its own is drawn about it.
        x = layers if len(layers) > 1 else [layers[0] - 0.3, layers[0] + 0.3]
        if len(layers) == 1:
            low, high = low.repeat(2), high.repeat(2)
            ax.set_xlim(layers[0] - 1.2, layers[0] + 1.2)
        alpha = 0.15 + 0.35 * (i + 1) / pairs
        ax.fill_between(x, low, high, color=colour, alpha=alpha, linewidth=0, label=label)
    if len(fractions) % 2:
        ax.plot(layers, values[:, pairs], "o-", color=INK, markersize=3, linewidth=1.2)
        ax.lines[-1].set_label(f"{fractions[pairs]:g}")
    tick_layers(ax, layers, names)
    legend(ax)
    return tidy(ax, heading(result, but=["layer"]), "layer", described(result["quantile"]))


def quantile_panels(result: Result, figure: Figure | SubFigure | None = None) -> np.ndarray:
    """Draw quantiles over layers, in a panel for each stage and group.

    Parameters
    ----------
    result : Dataset or DataTree
        From `actstore.quantiles`.
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
    >>> quantile_panels(actstore.quantiles(data), Figure()).shape
    (1, 1)
    """
    axes = facets(quantiles, result, figure, (3.6, 2.6), ["layer"])
    if axes.size > 1:  # in each panel it would cover the bands
        share_legend(axes)
    return axes


def profile(result: Result, variable: str, ax: Axes | None = None, *, log: bool = False) -> Axes:
    """Draw one variable over layers, a line for each stage, or for each group of one stage.

    Of results per neuron or head, the line is the median and the band the middle half of them; of
    truth values, the share that are true.

    Parameters
    ----------
    result : Dataset or DataTree
        Of any query, with layers.
    variable : str
        What to draw.
    ax : Axes, optional
        Where to draw; default a new figure.
    log : bool
        Logarithmic vertical axis.

    Returns
    -------
    Axes

    Examples
    --------
    >>> import actstore, numpy as np, xarray as xr
    >>> from matplotlib.figure import Figure
    >>> acts = np.random.default_rng(0).normal(size=(3, 20, 4)).astype("float32")
    >>> data = xr.DataArray(acts, dims=("layer", "token", "neuron"), name="mlp_out")
    >>> ax = profile(actstore.moments(data), "std", Figure().subplots())
    >>> ax.get_title(loc="left"), ax.get_xlabel()
    ('mlp_out, std', 'layer; median and middle half of neurons')
    """
    result = loaded(result)
    parts = stages_of(result)
    group = str(result.attrs.get("by"))
    ax = new_axes(ax)
    for stage, part in parts.items():
        drawn = holding(part, str(result.attrs.get("query", "moments")), variable)[variable]
        wide = [d for d in ("neuron", "head") if d in drawn.dims]
        allowed = ["layer", *wide, *([group] if len(parts) == 1 else [])]
        check_dims(drawn, *allowed)
        if group in drawn.dims and drawn.sizes[group] > 1:
            keys = drawn[group].values
            lines = {f"{group} {named(k)}": drawn.sel({group: k}) for k in keys}
            styles = list(zip(group_colours(len(keys)), MARKERS * len(keys), strict=False))
        else:
            lines = {stage: drawn}
            styles = [(stage_colour(stage) if stage else INK, stage_marker(stage))]
        layers = np.atleast_1d(part["layer"].values)
        for (label, line), (colour, marker) in zip(lines.items(), styles, strict=False):
            low, middle, high = _middle(line, wide, len(layers))
            ax.plot(layers, middle, marker=marker, color=colour, label=label, markersize=4)
            if wide and line.dtype != bool:
                ax.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)
    tick_layers(ax, *layers_of(parts))
    drawn_y = np.concatenate([np.asarray(line.get_ydata()) for line in ax.lines])
    if log and (np.isfinite(drawn_y) & (drawn_y > 0)).any():
        ax.set_yscale("log")
    if len(ax.get_legend_handles_labels()[1]) > 1:
        legend(ax)
    first = next(iter(parts.values()))
    about = heading(first, but=["layer"]) if len(parts) == 1 else ""
    title = ", ".join(filter(None, (about, variable.replace("_", " "))))
    x, y = "layer", described(first[variable])
    if wide and first[variable].dtype == bool:
        y = f"share of {wide[0]}s"
    elif wide:
        x = f"layer; median and middle half of {wide[0]}s"
    return tidy(ax, title, x, y)


def _middle(line: xr.DataArray, wide: Sequence[str], layers: int) -> np.ndarray:
    """Lower quartile, median and upper quartile over neurons, for each layer."""
    values = line.transpose(..., *wide).values.reshape(layers, -1)
    if not wide or values.dtype == bool:
        return np.tile(values.mean(axis=1), (3, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # layers where all are NaN, or inf
        return np.nanquantile(values, [0.25, 0.5, 0.75], axis=1)


def profiles(
    result: Result,
    figure: Figure | SubFigure | None = None,
    *,
    variables: Sequence[str],
    log: bool = False,
) -> np.ndarray:
    """Draw several variables over layers, a panel each, or for several groups a column a stage.

    Parameters
    ----------
    result : Dataset or DataTree
        Of any query, with layers.
    figure : Figure or SubFigure, optional
        Where to draw; default a new figure.
    variables : sequence of str
        What to draw.
    log : bool
        Logarithmic vertical axes.

    Returns
    -------
    ndarray of Axes

    Examples
    --------
    >>> import actstore, numpy as np, xarray as xr
    >>> from matplotlib.figure import Figure
    >>> acts = np.random.default_rng(0).normal(size=(3, 20, 4)).astype("float32")
    >>> data = xr.DataArray(acts, dims=("layer", "token", "neuron"), name="mlp_out")
    >>> axes = profiles(actstore.moments(data), Figure(), variables=("mean", "std"))
    >>> [ax.get_title(loc="left") for ax in axes.flat]
    ['mlp_out, mean', 'mlp_out, std']
    """
    result = loaded(result)
    parts = stages_of(result)
    group = str(result.attrs.get("by"))
    if any(part.sizes.get(group, 1) > 1 for part in parts.values()):
        axes = panels(figure, len(variables), len(parts), (3.2, 2.3))
        for row, variable in zip(axes, variables, strict=True):
            for ax, part in zip(row, parts.values(), strict=True):
                profile(part, variable, ax, log=log)
    else:
        columns = min(3, len(variables))
        axes = panels(figure, -(-len(variables) // columns), columns, (3.2, 2.3))
        for ax, variable in zip(axes.flat, variables, strict=False):
            profile(result, variable, ax, log=log)
        for ax in axes.flat[len(variables) :]:
            ax.set_axis_off()
    share_legend(axes)
    return axes
