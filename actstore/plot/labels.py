"""What neurons tell about a label."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from .dimensions import columns_of
from .distributions import profile
from .style import (
    INK,
    Depth,
    Result,
    bar_rows,
    cells_of,
    check_dims,
    colour_bar,
    described,
    facets,
    holding,
    layers_of,
    loaded,
    new_axes,
    overlaid,
    panel_heading,
    panels,
    stage_colour,
    stages_of,
    thin_ticks,
    tidy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["label_bars", "label_profile", "label_ranks", "labels"]

_MOST_BARS = 20


def label_bars(result: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Draw the neurons that tell most about a label, best on top.

    With a null, lines are the mean of the shuffled labels and two standard deviations either side.

    Parameters
    ----------
    result : Dataset
        From `actstore.label_information`, of one stage and layer; at most 20 neurons are drawn.
    ax : Axes, optional
        Where to draw; default a new figure.

    Returns
    -------
    Axes

    Examples
    --------
    >>> import actstore, numpy as np, xarray as xr
    >>> from matplotlib.figure import Figure
    >>> acts = np.random.default_rng(0).normal(size=(40, 4)).astype("float32")
    >>> acts[:20, 2] += 5
    >>> data = xr.DataArray(acts, dims=("token", "neuron"), name="mlp_out")
    >>> data = data.assign_coords(mark=("token", [","] * 20 + ["."] * 20))
    >>> ax = label_bars(actstore.label_information(data, label="mark"), Figure().subplots())
    >>> ax.get_yticklabels()[0].get_text()
    'neuron 2'
    """
    result = holding(result, "label_information", "information")
    check_dims(result["information"], "neuron", "rank")
    ax = new_axes(ax)
    names = ("information", "null_mean", "null_std")
    own = {name: np.atleast_1d(result[name].values.ravel()) for name in names if name in result}
    neurons = np.atleast_1d(result["neuron"].values.ravel())
    order = np.argsort(-own["information"], kind="stable")
    order = order[np.isfinite(own["information"][order])][:_MOST_BARS]
    own = {name: values[order] for name, values in own.items()}
    stage = next(iter(stages_of(result)))
    colours = [stage_colour(stage) if stage else INK] * len(order)
    rows = [f"neuron {n}" for n in neurons[order]]
    bar_rows(ax, rows, own["information"][np.newaxis], colours, [""])
    words = _told(result)
    if "null_mean" in own:
        reach: Any = {"fmt": "none", "ecolor": INK, "elinewidth": 1, "capsize": 2.5}
        ax.errorbar(own["null_mean"], range(len(order)), xerr=2 * own["null_std"], **reach)
        words += "\nlines: shuffled labels, ± 2 std"
    for bar in ax.patches:
        bar.set_alpha(0.6)
    ax.set_xlim(left=0)
    return tidy(ax, panel_heading(result), words)


def _told(result: xr.Dataset) -> str:
    words = described(result["information"])
    entropy = np.unique(result["label_entropy"].values.round(6))
    return f"{words[:-1]} of {entropy[0]:.2f})" if len(entropy) == 1 else words


def label_ranks(result: xr.Dataset, ax: Axes | None = None, *, depth: Depth | None = None) -> Axes:
    """Draw the information of all neurons from the best to the least, a line for each layer.

    With a null, the dashed line is what shuffled labels give in the middle of the neurons.

    Parameters
    ----------
    result : Dataset
        From `actstore.label_information`, of one stage.
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
    >>> data = data.assign_coords(condition=("token", ["internal", "terminal"] * 10))
    >>> result = actstore.label_information(data)
    >>> ax = label_ranks(result, Figure().subplots())
    >>> ax.get_xlabel()
    'neurons by rank'
    """
    result = holding(result, "label_information", "information")
    check_dims(result["information"], "layer", "neuron", "rank")
    ax = new_axes(ax)

    def line(part: xr.Dataset, colour: Any, label: str) -> None:
        values = np.sort(part["information"].values.ravel())[::-1]
        values = values[np.isfinite(values)]
        ax.plot(np.arange(1, len(values) + 1), values, color=colour, label=label, linewidth=1.3)

    overlaid(line, result, "layer" if result.sizes.get("layer", 1) > 1 else "", ax, depth)
    if "null_mean" in result:
        middle = float(np.nanmedian(result["null_mean"].values))
        ax.axhline(middle, color=INK, linestyle="--", linewidth=0.9)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:,g}")
    ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
    words = "neurons by rank" + ("; dashed: shuffled labels" if "null_mean" in result else "")
    return tidy(ax, panel_heading(result), words, _told(result))


def label_profile(result: Result, ax: Axes | None = None) -> Axes:
    """Draw the information of the best neuron over layers, a line for each stage or group.

    Parameters
    ----------
    result : Dataset or DataTree
        From `actstore.label_information`.
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
    >>> data = data.assign_coords(condition=("token", ["internal", "terminal"] * 10))
    >>> result = actstore.label_information(data)
    >>> ax = label_profile(result, Figure().subplots())
    >>> ax.get_ylabel().split()
    ['information', 'about', 'condition', '(bit)']
    """
    result = loaded(result)
    best = [_best(part) for part in stages_of(result).values()]
    joined = best[0]
    if len(best) > 1:
        names = np.array([str(d["stage"].item()) for d in best], object)
        joined = xr.concat(best, xr.Variable("stage", names), join="outer", coords="minimal")
    ax = profile(joined.assign_attrs(result.attrs), "best_neuron", ax)
    thin_ticks(ax)
    ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
    return ax


def _best(part: xr.Dataset) -> xr.Dataset:
    over = [d for d in ("neuron", "rank") if d in part["information"].dims]
    best = part["information"].max(over).assign_attrs(part["information"].attrs)
    made = best.drop_vars([c for c in best.coords if c not in (*best.dims, "stage", "layer")])
    return made.to_dataset(name="best_neuron").assign_attrs(part.attrs)


def labels(result: Result, figure: Figure | SubFigure | None = None) -> np.ndarray:
    """Draw what neurons tell about a label: bars of the best; over layers all, and the best.

    Parameters
    ----------
    result : Dataset or DataTree
        From `actstore.label_information`. Of one layer, or with ``k``, bars in a panel for each
        stage, layer and group; else the best neuron over layers, and the neurons of each stage
        and group by rank.
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
    >>> data = data.assign_coords(condition=("token", ["internal", "terminal"] * 10))
    >>> axes = labels(actstore.label_information(data), Figure())
    >>> axes.shape
    (1, 2)
    """
    result = loaded(result)
    parts = stages_of(result)
    bars = any("rank" in part.dims for part in parts.values())
    if bars or max(part.sizes.get("layer", 1) for part in parts.values()) == 1:
        widest = max(
            max(part.sizes.get("neuron", 0), part.sizes.get("rank", 0)) for part in parts.values()
        )
        height = 0.9 + 0.16 * min(_MOST_BARS, max(2, widest))
        return facets(label_bars, result, figure, (3.4, height), ["neuron", "rank"])
    depth = Depth(*layers_of(parts))
    profiles = columns_of(result)
    cells = [cell for part in parts.values() for cell in cells_of(part)]
    n = len(profiles) + len(cells)
    columns = min(n, 3 if n in (3, 5, 6, 9) else 4)
    axes = panels(figure, -(-n // columns), columns, (3.5, 2.7))
    for ax, part in zip(axes.flat, profiles, strict=False):
        label_profile(part, ax)
    for ax, cell in zip(axes.flat[len(profiles) :], cells, strict=False):
        label_ranks(cell, ax, depth=depth)
    for ax in axes.flat[n:]:
        ax.set_axis_off()
    colour_bar(depth, list(axes.flat))
    return axes
